import math

import pytest
import torch
from tiny_models import (
    bits,
)

from lata_lightning.errors import CorruptFileError
from lata_lightning.numerics.combine import combine


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_a_half_precision_result_is_not_rounded_a_second_time_by_way_of_float32(dtype, unit):
    # A little more than half a unit above 1: up. Float32 cannot hold the little, and from the middle one would go down to the even neighbour.
    little = 2.0**-40
    update = torch.tensor(
        [unit / 2 + little, unit / 2 - little, unit / 2, 1.5 * unit + little, 1.5 * unit - little, 1.5 * unit], dtype=torch.float64
    )
    found = combine(torch.ones(6, dtype=dtype), [(update, 1.0)], dtype)
    assert ((found.double() - 1) / unit).tolist() == [1, 0, 0, 2, 1, 2]
    mirrored = combine(-torch.ones(6, dtype=dtype), [(update, -1.0)], dtype)
    assert torch.equal(mirrored, -found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_below_the_normal_range_are_correctly_rounded_too(dtype):
    smallest = 2.0**-133 if dtype == torch.bfloat16 else 2.0**-24
    values = torch.tensor([0.5, 0.5 + 2**-40, 1.5, 1.5 - 2**-40, 2.5, 2.5 + 2**-40, -0.5 - 2**-40], dtype=torch.float64) * smallest
    found = combine(values, [], dtype)
    assert (found.double() / smallest).tolist() == [0, 1, 2, 1, 2, 3, -1]


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537])
def test_tensors_of_any_size_are_combined_whole(size):
    onto, task = torch.randn(size), torch.randn(size)
    assert torch.equal(combine(onto, [(task, 0.5)], torch.float32), (onto.double() + 0.5 * task.double()).float())
    scalar = combine(torch.tensor(1.5), [(torch.tensor(2.0), 0.25)], torch.float32)
    assert (scalar.shape, scalar.item()) == ((), 2.0)


def test_the_order_in_memory_does_not_change_the_result():
    onto, task = torch.randn(7, 5), torch.randn(5, 7).t()
    assert torch.equal(combine(onto, [(task, 1.0)], torch.float32), (onto.double() + task.double()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_on_which_no_vector_acts_keeps_every_bit(dtype):
    limits = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.5, limits.max, limits.tiny, limits.tiny / 4], dtype=torch.float64).to(dtype)
    assert torch.equal(bits(combine(special, [], dtype)), bits(special))
    zero = torch.zeros_like(special, dtype=torch.float32)
    assert torch.equal(bits(combine(special, [(zero, 1.0)], dtype)), bits(special))
    assert torch.equal(bits(combine(special, [(-zero, 1.0)], dtype)), bits(special))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_entries_that_nothing_changes_stay_as_they_are(dtype):
    onto, vector = torch.tensor([0.5, -math.inf, math.nan]), torch.tensor([1.0, 0.0, 0.0])
    for parts, first in (([], 0.5), ([(vector, 2.0)], 2.5)):
        found = combine(onto, parts, dtype)
        assert found[0] == first
        assert found[1] == -math.inf
        assert found[2].isnan()


def test_infinities_that_cancel_in_a_sum_are_not_overlooked():
    with pytest.raises(CorruptFileError, match="NaN or infinite"):
        combine(torch.tensor([math.inf, -math.inf]), [(torch.ones(2), 1.0)], torch.float32)
    with pytest.raises(CorruptFileError, match="too large for torch.bfloat16"):
        combine(torch.tensor([1e300, -1e300], dtype=torch.float64), [], torch.bfloat16)
    huge = torch.full((4,), 1.7e308, dtype=torch.float64)
    assert torch.equal(combine(huge, [], torch.float64), huge), "finite weights whose sum is not finite are no error"
