"""How a vector was made of others, as its manifest records it."""

import json

import pytest
from tiny_models import weights

from lata_lightning import TaskVector
from lata_lightning.vectors.inspection import describe
from lata_lightning.vectors.manifest import read_manifest
from lata_lightning.vectors.provenance import OUTSIDE, Derivation, Identity, Input, LayerValues

OLDER = {
    "regression": (
        {
            "in_order": True,
            "off_diagonal": 0.9,
            "ridge": 1e-06,
            "vectors": [
                {"label": "one", "tuned": {"location": "tuned", "revision": None, "content_hash": None}, "samples": 30, "data": "a"}
            ],
            "averaged": ["w"],
        },
        Derivation(
            "regression",
            {"in_order": True, "off_diagonal": 0.9, "ridge": 1e-06},
            (Input("one", Identity("tuned"), {"samples": 30, "data": "a"}),),
            ("w",),
        ),
    ),
    "projection": (
        {"level": "block", "shares": {"model.layers.0": 0.5}, "outside": 0.25},
        Derivation(
            "projection",
            {"level": "block"},
            measured=(LayerValues("times the instruction vector", {"model.layers.0": 0.5, OUTSIDE: 0.25}),),
        ),
    ),
}


@pytest.fixture
def saved(tmp_path):
    """Directory of a saved vector."""
    TaskVector.between(weights(1), weights(2)).save(tmp_path / "vector")
    return tmp_path / "vector"


def edited(directory, **changes):
    path = directory / "task_vector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("key", OLDER)
def test_what_older_manifests_say_of_a_derivation_is_read(saved, key):
    written, expected = OLDER[key]
    edited(saved, format_version=2, **{key: written})
    assert read_manifest(saved).derivation == expected


def test_inspecting_shows_the_method_its_vectors_and_the_range_of_what_was_measured(saved):
    made = Derivation(
        "regression",
        {"ridge": 1.0},
        (Input("one"), Input("two")),
        measured=(LayerValues("interference", {"model.layers.0": 0.5, "model.layers.1": 0.25, OUTSIDE: None}, "one"),),
    )
    vector = TaskVector.open(saved)
    TaskVector(vector.tensors, vector.manifest.__class__(**{**vars(vector.manifest), "derivation": made})).save(saved.parent / "derived")
    facts = describe(saved.parent / "derived")
    assert (facts["derivation"], facts["derivation settings"], facts["made of"]) == ("regression", {"ridge": 1.0}, "one, two")
    assert facts["interference, one"] == "0.25 (model.layers.1) to 0.5 (model.layers.0)"
    card = (saved.parent / "derived/README.md").read_text()
    assert "| layer | interference, one |" in card
    assert "| outside the layers | – |" in card
    assert not any("derivation" in fact for fact in describe(saved))
