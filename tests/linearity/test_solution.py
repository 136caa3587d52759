import json

import pytest
import torch
from linear_models import Chain, tuned, vectors_of
from tiny_models import leftovers

from lata_lightning import TaskVector, align
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, OutputError, SourceError
from lata_lightning.linearity.solution import LayerFit, Solution, SolvedVector
from lata_lightning.vectors.provenance import Identity

LAYERS = ("blocks.0", "blocks.1")


def solution(count=2, numbers=(0.25, 0.75), **changes):
    vectors = tuple(
        SolvedVector(f"vector {number}", Identity(f"tuned-{number}"), 30, dict(zip(LAYERS, numbers, strict=True)))
        for number in range(count)
    )
    settings = {"level": "block", "outside": 0.5, "ridge": 1e-6, "start": Identity("start"), "vectors": vectors}
    return Solution(**(settings | {"fits": {"blocks.0": LayerFit(2.0, 0.125), "blocks.1": LayerFit(None, None)}} | changes))


@pytest.fixture
def vectors():
    start = Chain()
    return vectors_of(start, [tuned(start, seed=seed) for seed in (1, 2)])


def test_a_file_gives_back_what_was_saved(tmp_path):
    solution().save(tmp_path / "new" / "coefficients.json")
    assert Solution.open(tmp_path / "new" / "coefficients.json") == solution()
    assert leftovers(tmp_path / "new") == []


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="taken exists already"):
        solution().save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written"):
        solution().save(tmp_path / "taken" / "below")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"format": "other"}, CorruptFileError, "format 'other'"),
        ({"rule": "linear"}, CorruptFileError, "the rule 'linear'"),
        ({"format_version": 2}, SourceError, "format version 2, this lata_lightning reads up to 1"),
        ({"level": "head"}, CorruptFileError, "unknown level 'head'"),
        ({"outside": "much"}, CorruptFileError, "no file of coefficients"),
        ({"vectors": []}, CorruptFileError, "not finite numbers"),
        ({"layers": {"a": {}}}, CorruptFileError, "no file of coefficients"),
        ({"vectors": 3}, CorruptFileError, "no file of coefficients"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, error, match):
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps(solution().to_json() | change))
    with pytest.raises(error, match=match):
        Solution.open(path)


def test_coefficients_in_a_file_must_be_finite_and_of_the_same_layers(tmp_path):
    data = solution().to_json()
    path = tmp_path / "coefficients.json"
    data["vectors"][0]["coefficients"]["blocks.0"] = float("nan")
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match="not finite numbers"):
        Solution.open(path)
    data["vectors"][0]["coefficients"] = {"blocks.0": 1.0}
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptFileError, match="vectors with different layers"):
        Solution.open(path)


def test_what_is_no_file_of_coefficients_is_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        Solution.open(tmp_path / "nowhere")
    for content in ("{", "[]", "{}", "3"):
        (tmp_path / "file").write_text(content)
        with pytest.raises(CorruptFileError, match="no file of coefficients"):
            Solution.open(tmp_path / "file")


def test_vectors_get_their_coefficients(vectors):
    for vector in solution().apply(vectors):
        assert vector.coefficient_of("blocks.1.bias") == 0.75
        assert (vector.manifest.weighting, vector.manifest.level, vector.manifest.outside) == ("closed-form", "block", 0.5)
    assert vectors[0].manifest.coefficients is None


def test_as_many_vectors_must_be_given_as_were_solved_for(vectors):
    with pytest.raises(LataError, match=r"are for 2 vectors, got 1; solved for were vector 0, vector 1"):
        solution().apply(vectors[:1])


def test_vectors_in_another_order_are_refused_where_it_is_known(vectors, tmp_path):
    start = Chain()
    saved = [TaskVector.between(start, tuned(start, seed=seed)).save(tmp_path / str(seed)) for seed in (1, 2)]
    hashed = tuple(SolvedVector(v.label, v.manifest.tuned_identity, 1, dict.fromkeys(LAYERS, 1.0)) for v in saved)
    assert len(solution(vectors=hashed).apply(saved)) == 2
    with pytest.raises(BaseMismatchError, match=r"1, which is another vector"):
        solution(vectors=hashed).apply(saved[::-1])
    assert len(solution(vectors=hashed).apply(saved[::-1], check_base=False)) == 2
    # Vectors in memory are known by nothing.
    assert len(solution(vectors=hashed).apply(vectors[::-1])) == 2


def test_paths_tell_the_order_but_may_change(tmp_path):
    start = Chain()
    found = []
    for seed in (1, 2, 3):
        torch.save({"state_dict": tuned(start, seed=seed).state_dict()}, tmp_path / f"{seed}.ckpt")
        found.append(TaskVector.between(start, tmp_path / f"{seed}.ckpt"))
    first, second, moved = found
    solved = solution(
        vectors=tuple(SolvedVector(v.label, v.manifest.tuned_identity, 1, dict.fromkeys(LAYERS, 1.0)) for v in (first, second))
    )
    with pytest.raises(BaseMismatchError, match="in the order in which"):
        solved.apply([second, first])
    assert len(solved.apply([moved, second])) == 2
    in_memory = TaskVector.between(start, tuned(start))
    unknown = SolvedVector(in_memory.label, in_memory.manifest.tuned_identity, 1, dict.fromkeys(LAYERS, 1.0))
    assert len(solution(vectors=(solved.vectors[0], unknown)).apply([in_memory, in_memory])) == 2


def test_layers_must_be_those_of_the_vector(vectors):
    with pytest.raises(LataError, match=r"one coefficient for each block of .*; on one side only are 1: \['blocks.1'\]"):
        vectors[0].with_coefficients({"blocks.0": 1.0})
    with pytest.raises(LataError, match="on one side only are 4"):
        vectors[0].with_coefficients({"blocks.0": 1.0, "blocks.1": 1.0}, level="submodule")
    with pytest.raises(LataError, match="cannot come from 'thin air'; choose one of linear, log, threshold, none, closed-form"):
        vectors[0].with_coefficients({"blocks.0": 1.0, "blocks.1": 1.0}, weighting="thin air")
    with pytest.raises(LataError, match="unknown level 'head'"):
        vectors[0].with_coefficients({}, level="head")
    with pytest.raises(LataError, match=r"must be finite numbers; they are not in 1: \['blocks.1'\]"):
        vectors[0].with_coefficients({"blocks.0": 1.0, "blocks.1": float("inf")})
    with pytest.raises(LataError, match=r"not in 1: \['outside'\]"):
        vectors[0].with_coefficients({"blocks.0": 1.0, "blocks.1": 1.0}, outside=float("nan"))


def test_an_artefact_keeps_coefficients_that_no_rule_made(vectors, tmp_path):
    weighted = vectors[0].with_coefficients({"blocks.0": 0.3, "blocks.1": -1.5}, outside=2.0)
    saved = weighted.save(tmp_path / "vector")
    assert saved.manifest.coefficients == {"blocks.0": 0.3, "blocks.1": -1.5}
    assert (saved.manifest.weighting, saved.manifest.outside) == ("closed-form", 2.0)
    card = (tmp_path / "vector/README.md").read_text()
    assert "| blocks.1 | -1.5000 |" in card
    assert "Tensors outside the layers have coefficient 2." in card
    assert saved.pure()["blocks.1.bias"].equal(vectors[0]["blocks.1.bias"] * -1.5)


@pytest.mark.parametrize("level", ["block", "tensor"])
def test_a_measured_alignment_stays_beside_the_coefficients(vectors, tmp_path, level):
    start = Chain()
    instruction = TaskVector.between(start, tuned(start, seed=9), kind="instruction")
    ranked = vectors[0].weighted(align(vectors[0], instruction, check_base=False), "linear")
    layers = ranked.layers.layers(level)
    solved = ranked.with_coefficients(dict.fromkeys(layers, 0.4), level=level).save(tmp_path / "vector")
    assert solved.manifest.alignment.values == ranked.manifest.alignment.values
    shown = {stats.coefficient for stats in solved.manifest.alignment.layers.values()}
    assert shown == ({0.4} if level == "block" else {None})
    card = (tmp_path / "vector/README.md").read_text()
    assert "Alignment with the instruction vector, by block (" in card
    assert f"Coefficients in closed form from samples of the task, by {level} (" in card
