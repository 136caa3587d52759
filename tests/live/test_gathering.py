import math

import pytest
import torch
from small_modules import Stack, exported, follow, train


def state(module):
    return {name: tensor.detach().double().clone() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def test_running_statistics_are_exported_with_the_weights_and_constant_buffers_as_unchanged():
    module = Stack()
    module.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    module.register_buffer("lost", torch.tensor([math.nan]))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    tracker, _ = follow(module)
    before = state(module)
    train(module)
    vector, unchanged = exported(tracker)
    assert unchanged == {"mask", "lost"}
    after = state(module)
    assert set(vector) == set(after)
    for name in set(vector) - unchanged:
        torch.testing.assert_close(vector[name].double(), after[name] - before[name], rtol=0, atol=1e-7)
    assert vector["layers.0.norm.running_mean"].any()
    assert not vector["mask"].any()


@pytest.mark.parametrize("value", [torch.full((5, 5), -math.inf).triu(1), torch.full((3, 3), math.inf)], ids=["shape", "infinity"])
def test_a_buffer_without_a_difference_is_left_out_with_a_warning(value):
    module = Stack()
    module.register_buffer("mask", torch.zeros(3, 3))
    tracker, _ = follow(module)
    train(module)
    module.mask = value
    with pytest.warns(UserWarning, match=r"left out of the task vector: 1: \['mask'\]"):
        vector, _ = exported(tracker)
    assert "mask" not in vector
    assert "layers.0.norm.running_var" in vector


def test_a_parameter_with_infinite_entries_that_stays_as_it_is_is_exported_as_unchanged():
    module = Stack()
    module.bias = torch.nn.Parameter(torch.full((3, 3), -math.inf).triu(1))
    tracker, _ = follow(module)
    train(module)
    _, unchanged = exported(tracker)
    assert unchanged == {"bias"}
