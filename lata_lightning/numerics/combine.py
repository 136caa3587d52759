"""Adding differences to weights: one tensor of a merge, summed in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError
from lata_lightning.numerics.chunks import ChunkReader, chunk_bounds, factor_chunks, tensor_chunks
from lata_lightning.numerics.kernels import combine as combine_entries
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import all_finite, difference, same_entries

# The least sum that overflows a dtype: halfway between its largest number and the next one in the sequence.
_TOO_LARGE = {
    torch.float16: 65520.0,
    torch.bfloat16: (2 - 2.0**-8) * 2.0**127,
    torch.float32: (2 - 2.0**-24) * 2.0**127,
    torch.float64: math.inf,
}
NOT_FINITE = "NaN or infinite values"


class Summand(NamedTuple):
    """One summand of a merge: factor · vector, or factor · (vector − start).

    Attributes:
        factor: Dimensionless.
        vector: The difference, or the tuned weights that the start is subtracted from.
        start: The start weights, if they are read separately.
        from_onto: Whether ``vector`` holds tuned weights whose start is the model that the sum is added to.
    """

    factor: float
    vector: ChunkReader
    start: ChunkReader | None = None
    from_onto: bool = False


def combine(onto: Tensor, summands: Sequence[tuple[Tensor | LowRank, float]], dtype: torch.dtype) -> Tensor:
    """Return onto + Σ factor · vector, summed in float64 chunk by chunk and rounded once.

    Args:
        onto: The tensor that the summands are added to.
        summands: Differences of the same shape, dense or low-rank, each with its factor.
        dtype: Dtype of the result. Without summands and with the dtype of ``onto``, the result is bit for bit ``onto``.

    Raises:
        CorruptFileError: The result is not finite.
    """
    given = [
        Summand(factor, factor_chunks(vector) if isinstance(vector, LowRank) else tensor_chunks(vector)) for vector, factor in summands
    ]
    merged = torch.empty(onto.numel(), dtype=dtype)
    begin = 0
    for chunk in combined(onto.numel(), tensor_chunks(onto), given, dtype):
        merged[begin : begin + chunk.numel()] = chunk
        begin += chunk.numel()
    return merged.reshape(onto.shape)


def mean(tensors: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the mean of tensors of one shape, summed in float64, as float32; zeros if there are none."""
    total, count = torch.zeros(tuple(shape), dtype=torch.float64), 0
    for tensor in tensors:
        total += tensor
        count += 1
    return (total / max(count, 1)).float()


def combined(count: int, onto: ChunkReader, summands: Sequence[Summand], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield what ``combine`` returns chunk by chunk; each chunk is valid until the next is asked for.

    Args:
        count: Number of entries.
        onto: Reader of the weights.
        summands: What is added.
        dtype: Dtype of the result.
    """
    buffers: _Buffers | None = None
    for begin, end in chunk_bounds(count):
        weights = onto(begin, end)
        if not summands and weights.dtype == dtype:
            yield weights
            continue
        buffers = buffers or _Buffers(end - begin, len(summands), dtype)
        yield buffers.add(weights, summands, begin, end)


def _unchanged(weights: Tensor, summands: Sequence[Summand], loaded: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return a mask of the infinite and NaN weights to which every summand adds exactly zero."""
    unchanged = ~weights.isfinite()
    for summand, (vector, start) in zip(summands, loaded, strict=True):
        origin = weights if summand.from_onto else start
        unchanged &= vector == 0 if origin is None else same_entries(vector, origin)
    return unchanged


class _Buffers:
    """The buffers in which the chunks of one tensor are summed, allocated once: a new allocation for each chunk would cost as much as the sums."""

    def __init__(self, count: int, number: int, dtype: torch.dtype) -> None:
        self._count, self._number, self._dtype = count, number, dtype
        self._vectors: dict[torch.dtype, Tensor] = {}
        self._onto: dict[torch.dtype, Tensor] = {}
        self._merged = torch.empty(count, dtype=dtype)
        self._odd = torch.empty(count) if dtype.itemsize == 2 else None

    def add(self, weights: Tensor, summands: Sequence[Summand], begin: int, end: int) -> Tensor:
        """Return weights plus all summands, rounded."""
        count = end - begin
        loaded = [(summand.vector(begin, end), None if summand.start is None else summand.start(begin, end)) for summand in summands]
        dtypes = {weights.dtype, *(side.dtype for pair in loaded for side in pair if side is not None)}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        vectors, onto = self._rows(wide, count)
        if weights.dtype == wide:
            onto = weights
        else:
            onto.copy_(weights)
        less = np.zeros(len(summands), bool)
        for number, (summand, (vector, start)) in enumerate(zip(summands, loaded, strict=True)):
            row = vectors[number]
            start = weights if summand.from_onto else start
            if start is None:
                row.copy_(vector)
            elif torch.promote_types(torch.promote_types(vector.dtype, start.dtype), torch.float32) != wide:
                # Both sides are float32 or less, and so is their difference, whatever the other summands are.
                row.copy_(difference(vector, start))
            else:
                row.copy_(vector)
                less[number] = summand.from_onto
                if not summand.from_onto:
                    row.sub_(start)
        merged = self._merged[:count]
        rounded = merged if self._odd is None else self._odd[:count]
        factors = np.array([summand.factor for summand in summands], np.float64)
        largest = combine_entries(onto.numpy(), vectors.numpy(), less, factors, rounded.numpy(), self._odd is not None)
        if self._odd is not None:
            merged.copy_(rounded)
        # The largest magnitude is returned as bits, because NaN compares with nothing.
        if not np.uint64(largest).view(np.float64) < _TOO_LARGE[self._dtype]:
            # Entries that no summand changes stay as they are, infinite or not.
            unchanged = _unchanged(weights, summands, loaded)
            merged[unchanged] = weights[unchanged].to(self._dtype)
            if not all_finite(merged[~unchanged]):
                fits = np.isfinite(np.uint64(largest).view(np.float64))
                raise CorruptFileError(f"values too large for {self._dtype}" if fits else NOT_FINITE)
        return merged

    def _rows(self, wide: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
        """Return the buffer for the vectors, of shape (number, count), and the one for the weights."""
        if wide not in self._vectors:
            self._vectors[wide] = torch.empty(self._number * self._count, dtype=wide)
            self._onto[wide] = torch.empty(self._count, dtype=wide)
        return self._vectors[wide][: self._number * count].view(self._number, count), self._onto[wide][:count]
