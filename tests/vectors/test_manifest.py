import json
import math
from dataclasses import replace

import pytest
import torch
from small_vectors import edit, vector
from tiny_models import BLOCKS, same_bits, weights, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.writer import write_json
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.manifest import Manifest, library_versions, read_manifest
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector


@pytest.fixture
def saved(tmp_path):
    return TaskVector.between(weights(0), weights(1)).save(tmp_path / "vector")


def test_everything_in_the_manifest_survives_the_round_trip(tmp_path):
    write_model(tmp_path / "instruct", weights(0))
    write_model(tmp_path / "tuned", weights(1))
    instruction = vector(weights(7), kind="instruction")
    task = TaskVector.between(tmp_path / "instruct", tmp_path / "tuned")
    task = task.weighted(
        align(task, instruction, "submodule"), "threshold", threshold=0.25, outside=0.5, instruction_vector=instruction
    ).save(tmp_path / "vector")
    manifest = task.manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json(), allow_nan=False))) == manifest
    assert (manifest.level, manifest.weighting, manifest.threshold, manifest.outside) == ("submodule", "threshold", 0.25, 0.5)
    assert manifest.start_identity.location == str(tmp_path / "instruct")
    assert manifest.tensors["lm_head.weight"].shape == (6, 4)
    assert manifest.tensors["lm_head.weight"].dtype == "float32"
    again = TaskVector.open(tmp_path / "vector").save(tmp_path / "again")
    assert again.manifest == manifest
    data = json.loads((tmp_path / "vector" / "task_vector.json").read_text())
    assert (data["format"], data["format_version"]) == ("lata_lightning.task_vector", 3)
    assert data["alignment_too_flat_to_rank"] == manifest.alignment.flat
    assert data["alignment_spread"] == manifest.alignment.spread
    assert data["tensors"]["lm_head.weight"]["part"] == "head"
    assert data["tensors"][f"{BLOCKS[1]}.mlp.up_proj.weight"]["block"] == BLOCKS[1]


def test_step_epoch_and_tied_groups_survive_the_round_trip(tmp_path):
    task = vector(weights(1))
    manifest = replace(task.manifest, step=120, epoch=3, tied=(("lm_head.weight", "model.embed_tokens.weight"),))
    back = TaskVector(task.tensors, manifest).save(tmp_path / "vector").manifest
    assert (back.step, back.epoch, back.tied) == (120, 3, (("lm_head.weight", "model.embed_tokens.weight"),))
    assert "Taken at optimizer step 120, after 3 finished epochs." in (tmp_path / "vector" / "README.md").read_text()


@pytest.mark.parametrize("level", ["block", "submodule", "tensor"])
def test_a_reopened_vector_has_the_same_coefficients_in_the_same_layers(tmp_path, level):
    task = vector(weights(1))
    task = task.weighted(align(task, vector(weights(7)), level), "log", outside=1.0)
    back = task.save(tmp_path / "vector")
    assert back.manifest.coefficients == task.manifest.coefficients
    assert back.layers.layers(level) == task.layers.layers(level)
    assert same_bits(dict(back.pure()), dict(task.pure()))


def test_a_directory_without_a_manifest_is_no_task_vector(tmp_path):
    write_model(tmp_path / "model", weights())
    with pytest.raises(SourceError, match=r"is no task vector: it holds no task_vector.json. Make one with: lata extract"):
        TaskVector.open(tmp_path / "model")
    with pytest.raises(SourceError, match="is no task vector"):
        TaskVector.open(tmp_path / "nothing")


def test_a_manifest_of_a_newer_version_or_another_format_is_refused(tmp_path, saved):
    edit(tmp_path / "vector", lambda data: data.update(format_version=4))
    with pytest.raises(SourceError, match=r"format version 4, this lata_lightning reads up to 3. Upgrade it"):
        TaskVector.open(tmp_path / "vector")
    edit(tmp_path / "vector", lambda data: data.update(format="safetensors"))
    with pytest.raises(SourceError, match="is of format 'safetensors', expected 'lata_lightning.task_vector'"):
        TaskVector.open(tmp_path / "vector")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("tensors"),
        lambda data: data.pop("format"),
        lambda data: data.update(format_version="two"),
        lambda data: data.update(kind="merge"),
        lambda data: data.update(level="head"),
        lambda data: data["start"].update(kind="raw"),
        lambda data: data["start"].update(surprise=1),
        lambda data: data["weighting"].update(rule="square"),
        lambda data: data.update(tensors=[]),
        lambda data: data.update(blocks=["model.layers.0"]),
        lambda data: data["tensors"]["lm_head.weight"].update(shape=None),
        lambda data: data["tensors"][f"{BLOCKS[0]}.mlp.up_proj.weight"].update(part="fuel"),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0}),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0, BLOCKS[1]: math.nan}),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0, BLOCKS[1]: "1.0"}),
        lambda data: data.update(coefficients=dict.fromkeys(BLOCKS, 1.0), outside=None),
        lambda data: data.update(alignment={"level": "block"}),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_as_corrupt(tmp_path, saved, change):
    edit(tmp_path / "vector", change)
    with pytest.raises(CorruptFileError, match="task_vector.json is no valid task vector manifest"):
        TaskVector.open(tmp_path / "vector")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused_as_corrupt(tmp_path, saved, text):
    (tmp_path / "vector" / "task_vector.json").write_text(text)
    with pytest.raises(CorruptFileError, match="is no valid task vector manifest"):
        read_manifest(tmp_path / "vector")


def test_versions_of_the_libraries_are_noted_and_missing_ones_left_out(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from lata_lightning.vectors import manifest

    assert library_versions()["torch"] == torch.__version__

    def only_torch(name):
        if name != "torch":
            raise PackageNotFoundError(name)
        return "2.6"

    monkeypatch.setattr(manifest, "version", only_torch)
    assert library_versions() == {"torch": "2.6"}


def test_a_manifest_needs_no_file_to_be_written(tmp_path):
    manifest = vector(weights(1)).manifest
    write_json(tmp_path / "task_vector.json", manifest.to_json())
    assert manifest.to_json()["tensors"] == {}
    assert Identity() == Identity(None, None, None)
