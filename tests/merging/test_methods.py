"""Merging by a method that makes one vector of several first, beside merging the vector that it makes."""

import json

import pytest
import torch
from tiny_models import BLOCKS, plus, read_back, same_bits, weights, write_model

from lata_lightning import TaskVector, Term, merge
from lata_lightning.cli.main import main
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.methods import METHODS

START = weights(0)
TUNED = {name: plus(START, weights(seed), 0.1) for seed, name in ((1, "math"), (2, "text"))}
MAKING_ONE = [method for method in METHODS if method != "sum"]


@pytest.fixture
def models(tmp_path):
    """Directories of a start and two tuned models."""
    for name, tensors in {"start": START, **TUNED}.items():
        write_model(tmp_path / name, tensors, shards=2)
    return tmp_path


def vectors_of(models, **options):
    return [TaskVector.between(models / "start", models / name, **options) for name in TUNED]


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("method", MAKING_ONE)
def test_merging_by_a_method_is_merging_the_vector_it_makes(models, method, scale):
    vectors = vectors_of(models)
    merge(models / "start", [Term(vector, scale) for vector in vectors], models / "in-one-step", method=method, workers=2)
    one = merge_matrices(vectors, method).save(models / "one")
    merge(models / "start", [Term(one, scale)], models / "in-two-steps")
    assert same_bits(read_back(models / "in-one-step"), read_back(models / "in-two-steps"))


def test_the_record_and_the_card_say_how_the_vectors_were_made_into_one(models):
    vectors = vectors_of(models)
    merge(models / "start", [Term(vector) for vector in vectors], models / "merged", method="regression")
    record = json.loads((models / "merged/merge.json").read_text())
    made = merge_matrices(vectors).save(models / "one").manifest.derivation
    assert record["derivation"]["name"] == made.name == "regression without samples"
    assert record["derivation"]["settings"] == {"ridge": 1.0, "prior": "sum"}
    assert [entry["layers"] for entry in record["derivation"]["measured"]] == [dict(entry.layers) for entry in made.measured]
    assert [term["scale"] for term in record["terms"]] == [1.0, 1.0]
    card = (models / "merged/README.md").read_text()
    assert "by making one vector of several first" in card
    assert f"| layer | interference, {vectors[0].label} |" in card
    plain = merge(models / "start", [Term(vector) for vector in vectors], models / "summed")
    assert json.loads((plain / "merge.json").read_text())["derivation"] is None


def test_vectors_from_base_are_merged_onto_base(models):
    vectors = vectors_of(models, start_kind="base")
    merge(models / "start", [Term(vector) for vector in vectors], models / "merged", method="regression")
    one = merge_matrices(vectors)
    found = read_back(models / "merged")
    assert all(torch.equal(found[name], START[name] + one[name]) for name in found)


def test_a_tensor_that_no_vector_changes_is_written_as_it_is(models):
    name = f"{BLOCKS[0]}.mlp.up_proj.weight"
    still = [write_model(models / f"still-{key}", {**tensors, name: START[name]}) for key, tensors in TUNED.items()]
    terms = [Term(TaskVector.between(models / "start", path)) for path in still]
    for method in METHODS:
        merge(models / "start", terms, models / method, method=method)
        assert torch.equal(read_back(models / method)[name], START[name])


def refused(models, match, vectors=None, scales=(1.0, 1.0), error=LataError, **options):
    before = sorted(path.name for path in models.iterdir())
    terms = [Term(vector, scale) for vector, scale in zip(vectors or vectors_of(models), scales, strict=True)]
    with pytest.raises(error, match=match):
        merge(models / "start", terms, models / "merged", **options)
    assert sorted(path.name for path in models.iterdir()) == before


def test_what_has_no_meaning_is_refused_before_anything_is_written(models):
    plain = vectors_of(models)
    weighted = [vector.with_coefficients(dict.fromkeys(BLOCKS, 0.5)) for vector in plain]
    refused(models, "unknown method 'ties'; choose one of sum, regression, tsv, iso", method="ties")
    refused(models, "the method 'sum' adds on the CPU", device="cuda")
    refused(models, "takes vectors whole, and .* has coefficients", weighted, method="regression")
    refused(models, "which has one scale: got 1, 0.5", scales=(1.0, 0.5), method="iso")
    refused(models, "must count from one start", [plain[0], vectors_of(models, start_kind="base")[1]], method="tsv")
    refused(models, "cannot be solved on 'abacus' here", method="regression", device="abacus")


def test_broken_values_leave_nothing_behind(models):
    name = f"{BLOCKS[1]}.self_attn.q_proj.weight"
    write_model(models / "broken", {**TUNED["text"], name: TUNED["text"][name] * float("inf")})
    vectors = [TaskVector.between(models / "start", models / path) for path in ("math", "broken")]
    refused(models, f"{name}.*NaN or infinite values", vectors, error=CorruptFileError, method="regression")


def test_vectors_of_other_starts_are_refused(models):
    saved = []
    for seed in (5, 6):
        start, tuned = (write_model(models / f"{kind}-{seed}", weights(seed + shift)) for kind, shift in (("start", 0), ("tuned", 10)))
        saved.append(TaskVector.between(start, tuned).save(models / f"vector-{seed}"))
    refused(models, "different weights", saved, error=BaseMismatchError, method="regression")


def run(capsys, *words):
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("method", METHODS)
def test_the_command_merges_by_every_method(models, method, capsys):
    paths = [models / name for name in ("start", *TUNED)]
    status, printed, said = run(capsys, "merge", *paths, "--method", method, "--output", models / "merged")
    assert (status, printed) == (0, f"{models / 'merged'}\n")
    assert "--method regression would make them into one" not in said
    merge(models / "start", [Term(vector) for vector in vectors_of(models)], models / "expected", method=method)
    assert same_bits(read_back(models / "merged"), read_back(models / "expected"))
    assert run(capsys, "verify", models / "merged")[0] == 0


def test_the_command_says_what_it_does_with_several_vectors_by_default(models, capsys):
    paths = [models / name for name in ("start", *TUNED)]
    said = run(capsys, "merge", *paths, "--output", models / "merged")[2]
    assert "the vectors were added up (task arithmetic); --method regression would make them into one" in said
    assert "--method regression" not in run(capsys, "merge", *paths[:2], "--output", models / "of-one")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weighting", "linear"], "--method regression takes vectors whole, so --weighting cannot be given"),
        (["--instruction", "math"], "so --instruction cannot be given"),
        (["--coefficients", "file"], "so --coefficients cannot be given"),
        (["--scale", "1", "0.5"], "which has one scale"),
        (["--device", "abacus"], "cannot be solved on 'abacus' here"),
    ],
)
def test_the_command_refuses_what_the_method_does_not_take(models, words, message, capsys):
    paths = [models / name for name in ("start", *TUNED)]
    status, _, said = run(capsys, "merge", *paths, "--method", "regression", *words, "--output", models / "merged")
    assert status == 1
    assert message in said
    assert not (models / "merged").exists()
