"""Projection off the instruction vector: against numpy, its laws, and what is refused."""

import json

import numpy as np
import pytest
import torch
from in_factors import random_factors, vector_in_factors
from tiny_models import BLOCKS, plus, read_back, weights, write_model

from lata_lightning import TaskVector, Term, align, merge, project
from lata_lightning.errors import BaseMismatchError, LataError, LayoutMismatchError
from lata_lightning.layers import LEVELS
from lata_lightning.moments import STARTS
from lata_lightning.vectors.artefact import verify

BASE = weights(0)
INSTRUCT = plus(BASE, weights(1), 0.3)
# Along the instruction vector as well as across it, in every block differently.
TUNED = {name: tensor + (0.05 if BLOCKS[0] in name else 0.2) * weights(1)[name] for name, tensor in plus(INSTRUCT, weights(2), 0.1).items()}


def instruction():
    return TaskVector.between(BASE, INSTRUCT, kind="instruction")


def group(name, level):
    """The layer of a tensor, written down by hand for this layout; what is in none is one group."""
    block = next((block for block in BLOCKS if name.startswith(f"{block}.")), "")
    part = (
        {"self_attn": "attention", "mlp": "mlp", "input_layernorm": "norm"}[name.removeprefix(f"{block}.").split(".")[0]] if block else ""
    )
    return {"block": block, "submodule": f"{block}.{part}" if block else "", "tensor": name if block else ""}[level]


def across(vector, along, level):
    """The definition, in numpy and float64; shares by layer."""
    one, other = ({name: source[name].double().numpy() for name in source} for source in (vector, along))
    shares = {}
    for layer in {group(name, level) for name in one}:
        names = [name for name in one if group(name, level) == layer]
        flat, direction = (np.concatenate([side[name].ravel() for name in names]) for side in (one, other))
        shares[layer] = flat @ direction / (direction @ direction) if direction.any() else 0.0
    return {name: one[name] - shares[group(name, level)] * other[name] for name in one}, shares


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_left_is_the_part_across_by_numpy(level):
    vector = TaskVector.between(INSTRUCT, TUNED)
    found = project(vector, instruction(), level=level)
    expected, shares = across(vector, instruction(), level)
    for name in vector:
        assert np.allclose(found[name].numpy(), expected[name], rtol=0, atol=1e-6), name
    made = found.manifest.derivation
    assert (made.name, made.settings) == ("projection", {"level": level})
    assert [measured.name for measured in made.measured] == ["times the instruction vector"]
    taken = dict(made.measured[0].layers)
    assert taken.pop("outside the layers") == pytest.approx(shares.pop(""), rel=1e-6)
    assert taken == pytest.approx(shares, rel=1e-6)


def test_no_layer_goes_along_the_instruction_vector_any_more():
    found = project(TaskVector.between(INSTRUCT, TUNED), instruction(), level="block")
    for layer, names in found.layers.layers("block").items():
        inner = sum(float(found[name].double().flatten() @ instruction()[name].double().flatten()) for name in names)
        size = sum(float(found[name].double().square().sum()) for name in names) ** 0.5
        assert abs(inner) < 1e-5 * size, layer


def test_it_makes_no_difference_whether_a_vector_counts_from_base_or_from_instruct():
    from_instruct = project(TaskVector.between(INSTRUCT, TUNED), instruction())
    from_base = project(TaskVector.between(BASE, TUNED, start_kind="base"), instruction())
    # Nor whether it says so.
    unknown = project(TaskVector.between(BASE, TUNED), instruction())
    for name in from_instruct:
        assert torch.allclose(from_instruct[name], from_base[name], rtol=0, atol=1e-6)
        assert torch.equal(from_base[name], unknown[name])
    assert from_base.start == unknown.start == "instruct"


def test_projecting_again_changes_nothing_but_rounding():
    once = project(TaskVector.between(INSTRUCT, TUNED), instruction())
    twice = project(once, instruction())
    (taken,) = twice.manifest.derivation.measured
    assert max(map(abs, taken.layers.values())) < 1e-6
    assert all(torch.allclose(once[name], twice[name], rtol=0, atol=1e-6) for name in once)


def test_a_layer_where_the_instruction_vector_is_zero_stays_as_it_is():
    still = {name: tensor if BLOCKS[0] in name else BASE[name] for name, tensor in INSTRUCT.items()}
    vector = TaskVector.between(INSTRUCT, TUNED)
    found = project(vector, TaskVector.between(BASE, still, kind="instruction"), level="block")
    (taken,) = found.manifest.derivation.measured
    assert taken.layers[BLOCKS[1]] == taken.layers["outside the layers"] == 0.0
    for name in vector:
        assert torch.equal(found[name], vector[name]) == (BLOCKS[0] not in name)


def test_a_saved_projection_says_what_it_is_and_is_used_like_any_vector(tmp_path):
    vector = TaskVector.between(write_model(tmp_path / "instruct", INSTRUCT), write_model(tmp_path / "tuned", TUNED))
    found = project(
        vector, TaskVector.between(write_model(tmp_path / "base", BASE), tmp_path / "instruct", kind="instruction"), level="block"
    )
    saved = found.save(tmp_path / "across")
    verify(tmp_path / "across")
    assert TaskVector.open(tmp_path / "across").manifest.derivation == found.manifest.derivation
    assert all(torch.equal(saved[name], found[name]) for name in found)
    written = json.loads((tmp_path / "across/task_vector.json").read_text())
    assert written["derivation"]["name"] == "projection"
    assert [entry["label"] for entry in written["derivation"]["inputs"]] == [vector.label]
    assert [side["location"].split("/")[-1] for side in written["instruction_vector"].values()] == ["base", "instruct"]
    assert "Made by projection, level block." in (tmp_path / "across/README.md").read_text()
    assert align(saved, instruction(), check_base=False).layers.keys() == set(BLOCKS)
    merge(tmp_path / "instruct", [Term(saved, 0.5)], tmp_path / "merged")
    merged = TaskVector.between(tmp_path / "instruct", tmp_path / "merged")
    assert all(torch.allclose(merged[name], 0.5 * found[name], rtol=0, atol=1e-6) for name in found)


def test_coefficients_do_not_count():
    vector = TaskVector.between(INSTRUCT, TUNED)
    weighted = vector.weighted(align(vector, instruction()), "linear")
    one, other = project(vector, instruction()), project(weighted, instruction())
    assert other.manifest.coefficients is None
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_vector_from_base_that_calls_its_start_instruct_is_merged_onto_instruct_afterwards(tmp_path):
    base, instruct, tuned = (
        write_model(tmp_path / name, side) for name, side in (("base", BASE), ("instruct", INSTRUCT), ("tuned", TUNED))
    )
    along = TaskVector.between(base, instruct, kind="instruction").save(tmp_path / "along")
    expected = along.manifest.tuned_identity
    for start in STARTS:
        found = project(TaskVector.between(base, tuned, start_kind=start).save(tmp_path / f"from-{start}"), along)
        assert found.manifest.start_identity == expected
        merge(instruct, [Term(found.save(tmp_path / f"across-{start}"), 1.0)], tmp_path / f"merged-{start}")
    assert project(TaskVector.between(instruct, tuned).save(tmp_path / "known"), along).manifest.start_identity == expected


def test_an_instruction_vector_of_other_models_is_refused_unless_the_check_is_off(tmp_path):
    paths = {name: write_model(tmp_path / name, weights(seed)) for name, seed in (("a", 3), ("b", 4), ("c", 5), ("d", 6))}
    vector = TaskVector.between(paths["a"], paths["b"]).save(tmp_path / "vector")
    along = TaskVector.between(paths["c"], paths["d"], kind="instruction").save(tmp_path / "along")
    with pytest.raises(
        BaseMismatchError, match=r"vector started from .*a, and .*along is between .*c and .*d: these are different weights"
    ):
        project(vector, along)
    assert project(vector, along, check_base=False).manifest.derivation is not None
    # One side in common is enough: it is not known what the fine-tune started from.
    for sides in (("a", "c"), ("c", "a")):
        path = tmp_path / "".join(sides)
        assert project(vector, TaskVector.between(*(paths[side] for side in sides), kind="instruction").save(path)) is not None


def lora_vector(directory, seed, targets=("q_proj", "up_proj")):
    """A vector in factors, and what they add in float64."""
    factors = random_factors(BASE, [name for name in BASE if any(target in name for target in targets)], seed=seed)
    return vector_in_factors(directory, BASE, factors), {name: left.double() @ right.double() for name, (left, right) in factors.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("low_instruction", [False, True])
def test_what_is_left_of_a_lora_vector_is_the_part_across_by_numpy(tmp_path, level, low_instruction):
    vector, added = lora_vector(tmp_path / "lora", 3)
    along = lora_vector(tmp_path / "along", 4, targets=("q_proj", "lm_head"))[0] if low_instruction else instruction()
    expected, _ = across({name: added.get(name, torch.zeros(BASE[name].shape)) for name in BASE}, along, level)
    found = project(vector, along, level=level)
    saved = found.save(tmp_path / "across")
    for name in vector:
        for side in (found, saved):
            assert np.allclose(side[name].numpy(), expected[name], rtol=0, atol=1e-5), name


def test_what_a_lora_vector_leaves_alone_is_stored_by_its_projection_neither(tmp_path):
    vector, added = lora_vector(tmp_path / "lora", 3)
    saved = project(vector, instruction()).save(tmp_path / "across")
    assert set(saved) - saved.unchanged == set(added)
    assert set(read_back(tmp_path / "across")) == set(added)


def test_factors_stay_factors_beside_an_instruction_vector_in_factors(tmp_path):
    vector, added = lora_vector(tmp_path / "lora", 3)
    along, _ = lora_vector(tmp_path / "along", 4, targets=("q_proj", "lm_head"))
    saved = project(vector, along).save(tmp_path / "across")
    ranks = {name: held.rank for name in saved if (held := saved.low_rank(name)) is not None}
    assert ranks == {name: 4 if "q_proj" in name else 2 for name in added}
    assert saved.unchanged == set(BASE) - set(added)
    # Where the instruction vector is zero, the factors are those of the vector, bit for bit.
    name = next(name for name in added if "up_proj" in name)
    assert saved.low_rank(name).equals(vector.low_rank(name))


def test_vectors_of_other_tensors_and_unknown_levels_are_refused():
    vector = TaskVector.between(INSTRUCT, TUNED)
    with pytest.raises(LataError, match="unknown level 'head'"):
        project(vector, instruction(), level="head")
    wide = TaskVector.between(weights(0, width=8), weights(1, width=8), kind="instruction")
    with pytest.raises(LayoutMismatchError, match="must have the same shapes"):
        project(vector, wide)
