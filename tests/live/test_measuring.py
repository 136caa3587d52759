import math

import pytest
import torch
from small_modules import Stack, follow, train

from lata_lightning.errors import CorruptFileError
from lata_lightning.moments import total

INFINITE = float("-inf")


def parameter_norm(module, before):
    """‖τ‖ over the parameters alone, in float64."""
    return math.sqrt(
        sum((parameter.detach().double() - before[name]).square().sum().item() for name, parameter in module.named_parameters())
    )


def copies(module):
    return {name: parameter.detach().double().clone() for name, parameter in module.named_parameters()}


def mask(size=3):
    return torch.full((size, size), INFINITE).triu(1)


@pytest.mark.parametrize(
    "buffer",
    [mask(), torch.tensor([float("nan"), 1.0]), torch.arange(4.0), torch.tensor(INFINITE)],
    ids=["mask", "NaN", "rotary table", "scalar"],
)
def test_buffers_count_in_no_norm_whatever_they_hold(buffer):
    module = Stack()
    module.register_buffer("extra", buffer)
    tracker, measurement = follow(module)
    before = copies(module)
    train(module)
    table = measurement.sums().moments
    assert table["layers.0.norm.running_var"].task == 0.0
    assert total(table.values()).task_norm == pytest.approx(parameter_norm(module, before), rel=1e-9)
    assert tracker.positions.positions["extra"].part == "statistics"


def test_buffers_that_change_to_infinity_or_to_another_shape_end_no_measurement():
    module = Stack()
    module.register_buffer("extra", mask(3))
    module.register_buffer("peak", torch.zeros(2))
    _, measurement = follow(module)
    before = copies(module)
    train(module)
    module.extra, module.peak = mask(5), torch.full((2,), math.inf)
    assert total(measurement.sums().moments.values()).task_norm == pytest.approx(parameter_norm(module, before), rel=1e-9)


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_with_infinite_entries_that_stays_as_it_is_counts_as_unchanged(trained):
    module = Stack()
    module.bias = torch.nn.Parameter(mask(), requires_grad=trained)
    _, measurement = follow(module)
    train(module)
    table = measurement.sums().moments
    assert table["bias"].task == 0.0
    assert table["layers.1.attention.weight"].task > 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_that_diverged_is_refused(value):
    module = Stack()
    _, measurement = follow(module)
    with torch.no_grad():
        module.layers[0].attention.weight[0, 0] = value
    with pytest.raises(CorruptFileError, match="step at which training diverged"):
        measurement.sums()
