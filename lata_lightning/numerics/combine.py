"""Weights plus differences: one tensor of a merge, summed in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError
from lata_lightning.numerics.chunks import ChunkReader, chunk_bounds, factor_chunks, tensor_chunks
from lata_lightning.numerics.kernels import combine as combine_entries
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import all_finite, difference, same_entries

# Sums from which on a value no longer fits a dtype: halfway between its largest number and what would come next.
_TOO_LARGE = {
    torch.float16: 65520.0,
    torch.bfloat16: (2 - 2.0**-8) * 2.0**127,
    torch.float32: (2 - 2.0**-24) * 2.0**127,
    torch.float64: math.inf,
}
NOT_FINITE = "NaN or infinite values"


class Part(NamedTuple):
    """One summand: factor · vector, or factor · (vector − start).

    Attributes:
        factor: Dimensionless.
        vector: The difference; or the tuned weights, where something is to be subtracted.
        start: The start weights, if they are to be subtracted.
        from_onto: Whether ``vector`` holds tuned weights whose start is what the sum is added to.
    """

    factor: float
    vector: ChunkReader
    start: ChunkReader | None = None
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
    given = [Part(factor, factor_chunks(vector) if isinstance(vector, LowRank) else tensor_chunks(vector)) for vector, factor in parts]
    merged = torch.empty(onto.numel(), dtype=dtype)
    begin = 0
    for piece in combined(onto.numel(), tensor_chunks(onto), given, dtype):
        merged[begin : begin + piece.numel()] = piece
        begin += piece.numel()
    return merged.reshape(onto.shape)


def combined(count: int, onto: ChunkReader, parts: Sequence[Part], dtype: torch.dtype) -> Iterator[Tensor]:
    """The pieces of a sum, each valid until the next is asked for; as ``combine``.

    Args:
        count: Number of entries.
        onto: Gives the weights.
        parts: What is added.
        dtype: Of the result.
    """
    room: _Room | None = None
    for begin, end in chunk_bounds(count):
        weights = onto(begin, end)
        if not parts and weights.dtype == dtype:
            yield weights
            continue
        room = room or _Room(end - begin, len(parts), dtype)
        yield room.add(weights, parts, begin, end)


def _unchanged(weights: Tensor, parts: Sequence[Part], loaded: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Where weights are infinite or NaN and every part leaves them as they are."""
    still = ~weights.isfinite()
    for part, (vector, start) in zip(parts, loaded, strict=True):
        origin = weights if part.from_onto else start
        still &= vector == 0 if origin is None else same_entries(vector, origin)
    return still


class _Room:
    """The memory in which the pieces of one tensor are summed, made once: new memory for each piece costs as much as the sums."""

    def __init__(self, count: int, number: int, dtype: torch.dtype) -> None:
        self._count, self._number, self._dtype = count, number, dtype
        self._vectors: dict[torch.dtype, Tensor] = {}
        self._onto: dict[torch.dtype, Tensor] = {}
        self._merged = torch.empty(count, dtype=dtype)
        self._odd = torch.empty(count) if dtype.itemsize == 2 else None

    def add(self, weights: Tensor, parts: Sequence[Part], begin: int, end: int) -> Tensor:
        """Weights plus all parts, rounded."""
        count = end - begin
        loaded = [(part.vector(begin, end), None if part.start is None else part.start(begin, end)) for part in parts]
        held = {weights.dtype, *(side.dtype for pair in loaded for side in pair if side is not None)}
        wide = torch.float64 if torch.float64 in held else torch.float32
        vectors, onto = self._rows(wide, count)
        if weights.dtype == wide:
            onto = weights
        else:
            onto.copy_(weights)
        less = np.zeros(len(parts), bool)
        for number, (part, (vector, start)) in enumerate(zip(parts, loaded, strict=True)):
            row = vectors[number]
            start = weights if part.from_onto else start
            if start is None:
                row.copy_(vector)
            elif torch.promote_types(torch.promote_types(vector.dtype, start.dtype), torch.float32) != wide:
                # Both sides are float32 or less, and so is their difference, whatever the other parts are.
                row.copy_(difference(vector, start))
            else:
                row.copy_(vector)
                less[number] = part.from_onto
                if not part.from_onto:
                    row.sub_(start)
        merged = self._merged[:count]
        found = merged if self._odd is None else self._odd[:count]
        factors = np.array([part.factor for part in parts], np.float64)
        largest = combine_entries(onto.numpy(), vectors.numpy(), less, factors, found.numpy(), self._odd is not None)
        if self._odd is not None:
            merged.copy_(found)
        # The largest magnitude comes as its bits, as NaN would compare with nothing.
        if not np.uint64(largest).view(np.float64) < _TOO_LARGE[self._dtype]:
            # What no part changes stays as it is, infinite or not.
            still = _unchanged(weights, parts, loaded)
            merged[still] = weights[still].to(self._dtype)
            if not all_finite(merged[~still]):
                fits = np.isfinite(np.uint64(largest).view(np.float64))
                raise CorruptFileError(f"values too large for {self._dtype}" if fits else NOT_FINITE)
        return merged

    def _rows(self, wide: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
        """Room for the vectors, of shape (number, count), and for the weights."""
        if wide not in self._vectors:
            self._vectors[wide] = torch.empty(self._number * self._count, dtype=wide)
            self._onto[wide] = torch.empty(self._count, dtype=wide)
        return self._vectors[wide][: self._number * count].view(self._number, count), self._onto[wide][:count]
