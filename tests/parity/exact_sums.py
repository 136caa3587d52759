"""Merges in float64, from the safetensors files alone, and how far a result lies from them.

The sums below err by 2⁻⁵² of what is summed, the results compared with them by 2⁻²⁵ or more.
"""

from math import cos, exp
from typing import NamedTuple

import torch
from tiny_models import read_back

# Scales of the tuned models. No round numbers: those of a decimal kind put sums onto the middle between two neighbours, where the last bit of float64
# decides which of them is nearer.
SCALES = {"tuned-1": exp(-1), "tuned-2": cos(0.6)}


class Exact(NamedTuple):
    """A tensor of a merge as it ought to be.

    Attributes:
        values: In float64.
        unheld: By how much rounding each difference to float32 can move the sum; 0 where float32 holds all of them, as it does of half precisions.
    """

    values: torch.Tensor
    unheld: torch.Tensor


def exact_sum(onto, *terms):
    """Onto + Σ coefficient · (tuned − start), by tensor name.

    Args:
        onto: A directory.
        terms: Start directory, tuned directory and a coefficient, or coefficients by tensor name.
    """
    values = {name: tensor.double() for name, tensor in read_back(onto).items()}
    unheld = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    for start, tuned, coefficients in terms:
        begin, end = read_back(start), read_back(tuned)
        assert set(begin) == set(end) == set(values)
        for name in values:
            factor = coefficients if isinstance(coefficients, float) else coefficients[name]
            difference = end[name].double() - begin[name].double()
            values[name] += factor * difference
            unheld[name] += abs(factor) * 2**-24 * torch.where(difference.float().double() == difference, 0.0, difference.abs())
    return {name: Exact(values[name], unheld[name]) for name in values}


def nearest(values, dtype):
    """The numbers of a dtype next to float64 values, found by trying the neighbours of what torch makes of them."""
    middle = values.to(dtype)
    candidates = torch.stack([middle, *(torch.nextafter(middle, torch.full_like(middle, side)) for side in (-torch.inf, torch.inf))])
    best = (candidates.double() - values).abs().argmin(dim=0, keepdim=True)
    return candidates.gather(0, best).squeeze(0)


def assert_as_near_as_can_be(found, exact, dtype):
    """Refuse entries that are not the nearest number of the dtype to the exact answer or, where it counts, to one moved by rounded differences."""
    assert set(found) == set(exact)
    for name, (values, unheld) in exact.items():
        assert found[name].dtype == dtype, name
        error, least = ((side.double() - values).abs() for side in (found[name], nearest(values, dtype)))
        # Moved there and back.
        assert (error <= least + 2 * unheld).all(), name


def assert_no_further(ours, theirs, exact):
    """Refuse a result of ours that is further from the exact answer than theirs.

    Where float32 holds every difference, no entry may be. Elsewhere ours is rounded twice, and theirs more often: which of the two comes out ahead in
    one entry is chance, and so is whose one largest error is larger. Over all entries of the model it is not: there the errors are summed.
    """
    assert set(ours) == set(theirs) == set(exact)
    sums = torch.zeros(2, dtype=torch.float64)
    for name, (values, unheld) in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        one, other = ((side[name].double() - values).abs() for side in (ours, theirs))
        assert (one <= other)[unheld == 0].all(), name
        sums += torch.stack([one.sum(), other.sum()])
    assert sums[0] <= sums[1]
