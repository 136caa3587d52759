"""Weights plus differences: one tensor of a merge, summed in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError
from lata_lightning.low_rank import LowRank
from lata_lightning.pieces import Load, pieces_of, products, slices
from lata_lightning.sums import difference

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of a float64 that a float32 has no room for.
_CUT = np.int64((1 << 29) - 1)
# The smallest normal bfloat16 (and float32).
_SMALLEST = 0x0080


class Part(NamedTuple):
    """One summand: factor · vector, or factor · (vector − start).

    Attributes:
        factor: Dimensionless.
        vector: The difference; or the tuned weights, where something is to be subtracted.
        start: The start weights, if they are to be subtracted.
        from_onto: Whether ``vector`` holds tuned weights whose start is what the sum is added to.
    """

    factor: float
    vector: Load
    start: Load | None = None
    from_onto: bool = False


def combine(onto: Tensor, parts: Sequence[tuple[Tensor | LowRank, float]], dtype: torch.dtype) -> Tensor:
    """Onto + Σ factor · vector, summed in float64, piece by piece, and rounded once.

    Args:
        onto: Weights of one tensor.
        parts: Differences of the same shape, dense or low-rank, each with its factor.
        dtype: Of the result. Without parts and with the dtype of ``onto``, the result is bit for bit ``onto``.

    Raises:
        CorruptFileError: The result is not finite.
    """
    given = [Part(factor, products(vector) if isinstance(vector, LowRank) else slices(vector)) for vector, factor in parts]
    merged = torch.empty(onto.numel(), dtype=dtype)
    begin = 0
    for piece in combined(onto.numel(), slices(onto), given, dtype):
        merged[begin : begin + piece.numel()] = piece
        begin += piece.numel()
    return merged.reshape(onto.shape)


def combined(count: int, onto: Load, parts: Sequence[Part], dtype: torch.dtype) -> Iterator[Tensor]:
    """The pieces of a sum, each valid until the next is asked for; as ``combine``.

    Args:
        count: Number of entries.
        onto: Gives the weights.
        parts: What is added.
        dtype: Of the result.
    """
    room: _Room | None = None
    for begin, end in pieces_of(count):
        weights = onto(begin, end)
        if not parts and weights.dtype == dtype:
            _check_finite(weights, weights, dtype)
            yield weights
            continue
        room = room or _Room(end - begin, dtype)
        yield room.add(weights, parts, begin, end)


class _Room:
    """The memory in which the pieces of one tensor are summed, made once: new memory for each piece costs as much as the sums."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._sum, self._term = (torch.empty(count, dtype=torch.float64) for _ in range(2))
        self._single, self._wide = (torch.empty(count, dtype=torch.float32) for _ in range(2))
        self._merged = torch.empty(count, dtype=dtype)

    def add(self, weights: Tensor, parts: Sequence[Part], begin: int, end: int) -> Tensor:
        """Weights plus all parts, rounded."""
        count = end - begin
        total, term = self._sum[:count], self._term[:count]
        if not parts:
            total.zero_()
        start = weights
        if weights.element_size() == 2 and any(part.from_onto for part in parts):
            start = self._wide[:count].copy_(weights)
        for number, part in enumerate(parts):
            vector = part.vector(begin, end)
            if part.from_onto:
                vector = self._less(vector, start)
            elif part.start is not None:
                vector = self._less(vector, part.start(begin, end))
            # Opposite terms must cancel exactly. Hence the vectors are summed before the weights come in, and each product is rounded before it is
            # added (in add_(…, alpha=…) it would not be).
            if number == 0:
                total.copy_(vector).mul_(part.factor)
            else:
                total.add_(term.copy_(vector).mul_(part.factor))
        total.add_(term.copy_(weights))
        _keep_minus_zero(weights, total)
        merged = self._merged[:count]
        if merged.element_size() == 2:
            _round_once(total, self._single[:count], term, merged)
        else:
            merged.copy_(total)
        _check_finite(merged, total, merged.dtype)
        return merged

    def _less(self, tuned: Tensor, start: Tensor) -> Tensor:
        if torch.float64 in (tuned.dtype, start.dtype):
            return difference(tuned, start)
        single = self._single[: tuned.numel()]
        return torch.sub(single.copy_(tuned), start, out=single)


def _keep_minus_zero(weights: Tensor, total: Tensor) -> None:
    """Put back the sign of weights of -0.0 to which nothing was added, as -0.0 + 0.0 is +0.0."""
    bits = weights.view(_INTEGERS[weights.element_size()]).numpy()
    lowest = np.iinfo(bits.dtype).min
    # Looked for in the bits, as there are next to none.
    if bits.min() == lowest:
        found = np.flatnonzero(bits == lowest)
        values = total.numpy()
        values[found[values[found] == 0]] = -0.0


def _round_once(total: Tensor, single: Tensor, odd: Tensor, merged: Tensor) -> None:
    """Round float64 to a half precision, once; ``single`` (float32) and ``odd`` (float64) are scratch.

    Torch goes through float32, and would round twice. So the float64 is first cut to the bits that a float32 holds, and the last of them set if
    anything was cut off (rounding to odd): then the step to float32 is exact, and the second step rounds as the first value would.
    """
    bits, cut = total.view(torch.int64).numpy(), odd.view(torch.int64).numpy()
    np.bitwise_and(bits, _CUT, out=cut)
    np.add(cut, _CUT, out=cut)
    np.bitwise_or(cut, bits, out=cut)
    np.bitwise_and(cut, ~_CUT, out=cut)
    single.copy_(odd)
    merged.copy_(single)
    if merged.dtype == torch.bfloat16:
        # Below its smallest normal number a float32 holds fewer bits.
        small = (merged.view(torch.int16).numpy() & 0x7FFF) <= _SMALLEST
        if small.any():
            found = np.flatnonzero(small)
            found = found[total.numpy()[found] != 0]
            merged[found] = _beside_the_middle(total[found]).to(torch.bfloat16)


def _beside_the_middle(total: Tensor) -> Tensor:
    """Float64 values as float32 ones that torch rounds to bfloat16 as it should round the float64.

    A value that float32 rounds onto the middle between two neighbours would be rounded a second time, the wrong way half of the time; it is put
    back on its own side of the middle.
    """
    single = total.float()
    values, exact = single.numpy(), total.numpy()
    found = np.flatnonzero((values.view(np.uint32) & 0xFFFF) == 0x8000)
    side = np.where(exact[found] > values[found], np.float32(np.inf), np.float32(-np.inf))
    values[found] = np.where(exact[found] == values[found], values[found], np.nextafter(values[found], side))
    return single


def _check_finite(merged: Tensor, total: Tensor, dtype: torch.dtype) -> None:
    # The sum is finite where every value is, and far cheaper to look at.
    if not isfinite(merged.sum(dtype=torch.float64)) and not torch.isfinite(merged).all():
        overflow = merged is not total and torch.isfinite(total).all()
        raise CorruptFileError(f"values too large for {dtype}" if overflow else "NaN or infinite values")
