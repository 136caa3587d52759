import copy
import math
import pickle

import pytest
import torch
from tiny_models import weights

from lata_lightning.errors import CorruptFileError, LayoutMismatchError
from lata_lightning.layers import layer_map
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.metric import LayerAlignment
from lata_lightning.vectors.task_vector import TaskVector

LEVELS = ["block", "submodule", "tensor"]


def vector(tensors, **options):
    """A task vector whose tensors are the given ones."""
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("start", ["instruct", "base"])
def test_the_metric_equals_the_function(level, start):
    task, instruction = weights(1), weights(2)
    expected = align(vector(task), vector(instruction), level, start).values
    metric = LayerAlignment(layer_map(task), level, start)
    metric.update(task, instruction)
    found = metric.compute()
    assert list(found) == list(expected)
    assert {layer: value.item() for layer, value in found.items()} == pytest.approx(expected, abs=1e-15)
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in found.values())


def halves(tensors):
    return [{name: tensor.reshape(-1)[part] for name, tensor in tensors.items()} for part in (slice(0, 3), slice(3, None))]


def test_the_metric_adds_up_over_batches_of_tensors_and_over_shards():
    task, instruction = weights(1), weights(2)
    expected = align(vector(task), vector(instruction)).values
    by_tensor = LayerAlignment(layer_map(task))
    for name in task:
        by_tensor.update({name: task[name]}, {name: instruction[name]})
    by_shard = LayerAlignment(layer_map(task))
    for one, other in zip(halves(task), halves(instruction), strict=True):
        by_shard.update(one, other)
    for metric in (by_tensor, by_shard):
        assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_states_of_two_ranks_reduce_by_summing():
    task, instruction = weights(1), weights(2)
    ranks = [LayerAlignment(layer_map(task)) for _ in range(2)]
    for rank, one, other in zip(ranks, halves(task), halves(instruction), strict=True):
        rank.update(one, other)
    reduce = ranks[0]._reductions["sums"]
    assert reduce is torch.sum or reduce.__name__ == "dim_zero_sum"
    reduced = reduce(torch.stack([rank.sums for rank in ranks]))
    merged = copy.deepcopy(ranks[0])
    merged.merge_state(ranks[1])
    assert torch.equal(merged.sums, reduced)
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in merged.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_a_reset_metric_has_forgotten_everything():
    task, instruction = weights(1), weights(2)
    metric = LayerAlignment(layer_map(task))
    metric.update(weights(5), weights(6))
    metric.compute()
    metric.reset()
    metric.update(task, instruction)
    fresh = LayerAlignment(layer_map(task))
    fresh.update(task, instruction)
    assert metric.compute() == fresh.compute()


def test_calling_the_metric_gives_the_value_of_the_batch_and_adds_it_to_the_state():
    task, instruction = weights(1), weights(2)
    metric = LayerAlignment(layer_map(task))
    first, second = ((one, other) for one, other in zip(halves(task), halves(instruction), strict=True))
    metric(*first)
    of_batch = metric(*second)
    alone = LayerAlignment(layer_map(task))
    alone.update(*second)
    assert of_batch == alone.compute()
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_a_metric_survives_pickling_in_the_middle_of_its_work():
    task, instruction = weights(1), weights(2)
    (one, other), rest = zip(halves(task), halves(instruction), strict=True)
    metric = LayerAlignment(layer_map(task))
    metric.update(one, other)
    metric = pickle.loads(pickle.dumps(metric))  # noqa: S301
    metric.update(*rest)
    expected = align(vector(task), vector(instruction)).values
    assert {layer: value.item() for layer, value in metric.compute().items()} == pytest.approx(expected, abs=1e-14)


def test_the_metric_keeps_float64_sums_when_it_is_cast_with_its_model():
    metric = LayerAlignment(layer_map(weights())).half()
    metric.update(weights(1), weights(2))
    assert metric.sums.dtype == torch.float64


def test_the_metric_passes_over_tensors_outside_the_layers():
    task = weights(1)
    metric = LayerAlignment(layer_map(task))
    metric.update({"lm_head.weight": task["lm_head.weight"]}, {"lm_head.weight": task["lm_head.weight"]})
    assert metric.compute() == {}


def test_the_metric_refuses_tensors_on_one_side_only_and_other_shapes():
    metric = LayerAlignment(layer_map(weights()))
    with pytest.raises(LayoutMismatchError, match=r"same names; on one side only are 1: \['b'\]"):
        metric.update({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(LayoutMismatchError, match=r"got \(8, 4\) and \(4, 8\)"):
        metric.update({name: torch.zeros(8, 4)}, {name: torch.zeros(4, 8)})


def test_the_metric_refuses_sums_that_are_not_finite():
    task = weights(1)
    task["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf
    metric = LayerAlignment(layer_map(task))
    metric.update(task, weights(2))
    with pytest.raises(CorruptFileError, match=r"\['model.layers.0'\]"):
        metric.compute()
