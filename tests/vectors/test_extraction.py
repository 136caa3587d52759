import pytest
import torch
from tiny_models import BLOCKS, llama, weights, write_model

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.task_vector import TaskVector


def test_differences_of_half_precision_weights_are_float32_and_of_double_ones_float64():
    half = TaskVector.between(weights(0, dtype=torch.bfloat16), weights(1, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    wide = TaskVector.between(weights(0, dtype=torch.float64), weights(1))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64}


def test_nothing_is_read_before_a_tensor_is_asked_for(tmp_path):
    start, tuned = write_model(tmp_path / "start", weights(0)), write_model(tmp_path / "tuned", weights(1))
    sides = open_source(start), open_source(tuned)
    reads = []
    for side in sides:
        read = side.read
        side.read = lambda name, read=read: (reads.append(name), read(name))[1]
    task = TaskVector.between(*sides)
    assert reads == []
    task["lm_head.weight"]
    assert reads == ["lm_head.weight"] * 2


def test_blocks_are_known_from_module_directory_names_or_rule(tmp_path):
    model = llama(0)
    model.save_pretrained(tmp_path / "start")
    for task in (
        TaskVector.between(model, llama(1)),
        TaskVector.between(tmp_path / "start", llama(1)),
        TaskVector.between(model.state_dict(), llama(1)),
    ):
        assert task.layers.blocks == BLOCKS
        assert task.layers.positions["lm_head.weight"].part == "head"
    by_rule = TaskVector.between(
        {"one.w": torch.ones(1), "two.w": torch.ones(1)}, {"one.w": torch.ones(1), "two.w": torch.ones(1)}, layers=r"^\w+"
    )
    assert by_rule.layers.blocks == ("one", "two")


def test_equal_integer_tensors_are_left_out_and_different_ones_refused():
    steps = {"steps": torch.tensor(3)}
    assert "steps" not in TaskVector.between(weights(0) | steps, weights(1) | steps)
    with pytest.raises(LayoutMismatchError, match="steps holds integers, which must be equal in"):
        TaskVector.between(weights(0) | steps, weights(1) | {"steps": torch.tensor(4)})


def test_an_unknown_start_is_refused():
    with pytest.raises(LataError, match="unknown start 'raw'"):
        TaskVector.between(weights(0), weights(1), start_kind="raw")
