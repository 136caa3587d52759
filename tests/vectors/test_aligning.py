import math

import numpy as np
import pytest
import torch
from tiny_models import BLOCKS, plus, weights

from lata_lightning.alignment import alignment_of
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError
from lata_lightning.layers import layer_map
from lata_lightning.vectors.aligning import align, check_same_start, measure
from lata_lightning.vectors.task_vector import TaskVector

LEVELS = ["block", "submodule", "tensor"]


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


def vector(tensors, **options):
    """A task vector whose tensors are the given ones."""
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def in_one_piece(tensors, layer):
    """All tensors below a path as one float64 vector, by numpy."""
    return np.concatenate([tensor.double().numpy().reshape(-1) for name, tensor in sorted(tensors.items()) if name.startswith(layer + ".")])


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_alignment_of_a_block_is_the_cosine_of_its_tensors_as_one_vector():
    task, instruction = weights(1), weights(2)
    found = align(vector(task), vector(instruction, kind="instruction"))
    assert list(found.layers) == list(BLOCKS)
    for block in BLOCKS:
        one, other = in_one_piece(task, block), in_one_piece(instruction, block)
        stats = found.layers[block]
        assert stats.alignment == pytest.approx(cosine(one + other, other), abs=1e-14)
        assert stats.relative_norm == pytest.approx(np.linalg.norm(one) / np.linalg.norm(other), rel=1e-14)
        assert stats.task_norm == pytest.approx(np.linalg.norm(one), rel=1e-14)
        assert stats.instruction_norm == pytest.approx(np.linalg.norm(other), rel=1e-14)
        assert stats.coefficient is None


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_an_orthogonal_task_vector_is_aligned_by_its_relative_norm_alone(ratio):
    # s = 1/√(1+ρ²), METHODS: 1/√1.0625, 1/√2, 1/√10.
    task, instruction = zeros(), zeros()
    for block in BLOCKS:
        task[f"{block}.mlp.up_proj.weight"][0, 0] = 2 * ratio
        instruction[f"{block}.self_attn.q_proj.weight"][1, 1] = 2.0
    found = align(vector(task), vector(instruction))
    for block in BLOCKS:
        assert found.layers[block].alignment == pytest.approx(1 / math.sqrt(1 + ratio**2), abs=1e-15)
        assert found.layers[block].relative_norm == ratio


def test_a_layer_that_learned_nothing_has_alignment_one():
    found = align(vector(zeros()), vector(weights(2)))
    assert found.values == dict.fromkeys(BLOCKS, 1.0)


def test_where_the_instruction_vector_is_zero_the_alignment_is_absent_and_never_a_number():
    instruction = weights(2)
    for name in instruction:
        if name.startswith(BLOCKS[0]):
            instruction[name].zero_()
    found = align(vector(weights(1)), vector(instruction))
    assert found.undefined == [BLOCKS[0]]
    assert list(found.values) == [BLOCKS[1]]
    assert found.layers[BLOCKS[0]].alignment is None
    assert found.layers[BLOCKS[0]].relative_norm is None


def test_a_task_vector_that_undoes_the_instruction_vector_has_no_alignment():
    found = align(vector(plus(zeros(), weights(2), -1)), vector(weights(2)))
    assert found.undefined == list(BLOCKS)
    assert [found.layers[block].relative_norm for block in BLOCKS] == [1.0, 1.0]


@pytest.mark.parametrize("level", LEVELS)
def test_alignment_ignores_a_common_scale_of_both_vectors(level):
    task, instruction = weights(1), weights(2)
    one = align(vector(task), vector(instruction), level)
    other = align(vector(plus(zeros(), task, 4.0)), vector(plus(zeros(), instruction, 4.0)), level)
    assert one.values == other.values


def test_turning_both_vectors_around_does_not_change_the_alignment():
    task, instruction = weights(1), weights(2)
    one = align(vector(task), vector(instruction))
    other = align(vector(plus(zeros(), task, -1)), vector(plus(zeros(), instruction, -1)))
    assert one.values == other.values


def test_the_more_a_layer_moves_off_the_instruction_vector_the_lower_its_alignment():
    task, instruction = zeros(), zeros()
    for block in BLOCKS:
        task[f"{block}.mlp.up_proj.weight"][0, 0] = 1.0
        instruction[f"{block}.self_attn.q_proj.weight"][0, 0] = 1.0
    values = [align(vector(plus(zeros(), task, factor)), vector(instruction)).values[BLOCKS[0]] for factor in (0, 0.1, 0.5, 1, 2, 10)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 6


@pytest.mark.parametrize("level", ["block", "submodule"])
def test_sums_of_a_layer_are_the_sums_of_its_tensors(level):
    task, instruction = vector(weights(1)), vector(weights(2))
    tensors = align(task, instruction, "tensor").layers
    coarse = align(task, instruction, level).layers
    for layer, names in task.layers.layers(level).items():
        assert coarse[layer].task_norm ** 2 == pytest.approx(sum(tensors[name].task_norm ** 2 for name in names), rel=1e-14)
        assert coarse[layer].instruction_norm ** 2 == pytest.approx(sum(tensors[name].instruction_norm ** 2 for name in names), rel=1e-14)


@pytest.mark.parametrize("level", LEVELS)
def test_every_tensor_is_counted_in_exactly_one_layer_or_outside(level):
    task = weights(1)
    found = align(vector(task), vector(weights(2)), level)
    norms = [stats.task_norm**2 for stats in [*found.layers.values(), *found.outside.values()]]
    everything = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in task.values()])
    assert sum(norms) == pytest.approx(everything @ everything, rel=1e-13)
    assert set(found.outside) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("level", LEVELS)
def test_both_starts_give_one_alignment(level):
    # On a coarse grid every difference is exact, so the two ways round must agree to the last bit.
    base, step = weights(0, step=2**-8), 2**-8
    instruct = plus(base, weights(1, spread=0.1, step=step))
    from_instruct = plus(instruct, weights(2, spread=0.2, step=step))
    instruction = TaskVector.between(base, instruct, kind="instruction")
    one = align(TaskVector.between(instruct, from_instruct), instruction, level)
    other = align(TaskVector.between(base, from_instruct, start_kind="base"), instruction, level)
    assert (one.start, other.start) == ("instruct", "base")
    assert one.layers == other.layers
    assert one.outside == other.outside


def test_the_start_can_be_said_against_the_manifest():
    base, instruct, tuned = weights(0), weights(1), weights(2)
    instruction = TaskVector.between(base, instruct, kind="instruction")
    unlabelled = TaskVector.between(base, tuned)
    assert (
        align(unlabelled, instruction, start="base").values == align(TaskVector.between(base, tuned, start_kind="base"), instruction).values
    )


def test_aligning_changes_neither_vector():
    task, instruction = vector(weights(1)), vector(weights(2))
    align(task, instruction)
    assert all(torch.equal(task[name], tensor) for name, tensor in weights(1).items())
    assert all(torch.equal(instruction[name], tensor) for name, tensor in weights(2).items())


def test_vectors_over_other_tensors_are_refused_with_their_names():
    short = weights(1)
    del short["lm_head.weight"]
    with pytest.raises(
        LayoutMismatchError, match=r"same tensors; on one side only are 1: \['lm_head.weight'\]. Were both made from one base model"
    ):
        align(vector(short), vector(weights(2)))


def test_vectors_of_other_sizes_are_refused_with_both_shapes():
    with pytest.raises(
        LayoutMismatchError, match=r"2 of \d+ tensors differ: \['lm_head.weight', 'model.embed_tokens.weight'\].*\(6, 4\) and \(9, 4\)"
    ):
        align(vector(weights(1)), vector(weights(2, vocabulary=9)))


def test_an_unknown_level_or_start_is_refused():
    with pytest.raises(LataError, match="unknown level 'head'"):
        align(vector(weights(1)), vector(weights(2)), "head")
    with pytest.raises(LataError, match="unknown start 'raw'"):
        align(vector(weights(1)), vector(weights(2)), start="raw")
    with pytest.raises(LataError, match="unknown start 'raw'"):
        alignment_of({}, layer_map([]), start="raw")


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite_are_refused_by_name(side):
    pair = [weights(1), weights(2)]
    pair[side]["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    with pytest.raises(CorruptFileError, match=r"NaN or infinite values in 1: \['model.layers.1.mlp.up_proj.weight'\]"):
        measure(vector(pair[0]), vector(pair[1]))


@pytest.fixture
def saved(tmp_path):
    """Saved vectors know which weights they belong to."""
    base, instruct, stranger = weights(0), weights(1), weights(9)

    def save(name, start, tuned, **options):
        return TaskVector.between(start, tuned, **options).save(tmp_path / name)

    return {
        "instruction": save("instruction", base, instruct, kind="instruction"),
        "from instruct": save("from-instruct", instruct, weights(2)),
        "also from instruct": save("also", instruct, weights(3)),
        "from base": save("from-base", base, weights(2), start_kind="base"),
        "from stranger": save("from-stranger", stranger, weights(2)),
    }


def test_an_instruction_vector_of_other_weights_is_refused(saved):
    with pytest.raises(BaseMismatchError, match="are different weights.*say so .*--start"):
        align(saved["from stranger"], saved["instruction"])
    with pytest.raises(BaseMismatchError, match="If the fine-tune started from base, say so"):
        align(saved["from base"], saved["instruction"], start="instruct")
    with pytest.raises(BaseMismatchError, match="If the fine-tune started from instruct, say so"):
        align(saved["from instruct"], saved["instruction"], start="base")
    for name in ("from instruct", "from base"):
        assert align(saved[name], saved["instruction"]).values


def test_the_check_of_the_instruction_vector_can_be_switched_off(saved):
    assert align(saved["from stranger"], saved["instruction"], check_base=False).values


def test_an_instruction_vector_of_unknown_weights_passes_and_so_does_a_task_vector_of_unknown_start(saved):
    assert align(saved["from instruct"], vector(weights(5), kind="instruction")).values
    assert align(vector(weights(5)), saved["instruction"]).values


def test_vectors_from_different_starts_are_refused_and_unknown_starts_pass(saved):
    check_same_start([saved["from instruct"], saved["also from instruct"], vector(weights(5))])
    with pytest.raises(BaseMismatchError, match=r"no common origin.*check_base=False"):
        check_same_start([saved["from instruct"], saved["also from instruct"], saved["from stranger"]])
