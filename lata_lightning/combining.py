"""Weights plus differences: one tensor of a merge, summed in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError
from lata_lightning.low_rank import LowRank

# Elements summed at once: their float64 sums stay in the processor's cache.
_CHUNK = 1 << 16


def combine(onto: Tensor, parts: Sequence[tuple[Tensor | LowRank, float]], dtype: torch.dtype) -> Tensor:
    """Onto + Σ factor · vector, summed in float64, chunk by chunk, and rounded once.

    Args:
        onto: Weights of one tensor.
        parts: Differences of the same shape, dense or low-rank, each with its factor.
        dtype: Of the result. Without parts and with the dtype of ``onto``, the result is bit for bit ``onto``.

    Raises:
        CorruptFileError: The result is not finite.
    """
    flat = onto.reshape(-1)
    merged = torch.empty(flat.shape, dtype=dtype)
    untouched = not parts and dtype == onto.dtype
    factored = next((vector for vector, _ in parts if isinstance(vector, LowRank)), None)
    if factored is None:
        pieces = [slice(begin, begin + _CHUNK) for begin in range(0, flat.numel(), _CHUNK)]
    else:
        pieces = [slice(begin * factored.columns, end * factored.columns) for begin, end in factored.blocks()]
    streams = [_stream(vector, pieces) for vector, _ in parts]
    for piece in pieces:
        total = flat[piece]
        if not untouched:
            # Opposite terms must cancel exactly. Hence the vectors are summed before the weights come in, and each product is rounded before it is
            # added (in add_(…, alpha=…) it would not be). The sum has the opposite sign, as a weight of -0.0 survives minus zero, but not plus zero.
            taken = torch.zeros_like(total, dtype=torch.float64)
            for stream, (_, factor) in zip(streams, parts, strict=True):
                taken.sub_(next(stream) * factor)
            total = total.double() - taken
        merged[piece] = total if untouched else _ready_to_round(total, dtype)
        # The sum is finite where every value is, and far cheaper to look at.
        if not isfinite(merged[piece].sum(dtype=torch.float64)) and not torch.isfinite(merged[piece]).all():
            overflow = torch.isfinite(total).all()
            raise CorruptFileError(f"values too large for {dtype}" if overflow else "NaN or infinite values")
    return merged.reshape(onto.shape)


def _stream(vector: Tensor | LowRank, pieces: Sequence[slice]) -> Iterator[Tensor]:
    """The pieces of a flattened tensor, in float64; of factors the pieces must be their blocks."""
    if isinstance(vector, LowRank):
        return (values.reshape(-1) for _, _, values in vector.rows())
    return (vector.reshape(-1)[piece].double() for piece in pieces)


def _ready_to_round(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values in a form that torch rounds to the dtype once.

    Torch goes from float64 to a half precision through float32. A value that float32 rounds onto the middle between two neighbours would then
    be rounded a second time, the wrong way half of the time; it is put back on its own side of the middle.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return total
    single = total.float()
    values = single.numpy()
    # Low bits of a float32 that lies in the middle between two neighbours (float16: that may lie there, as its small numbers have fewer bits).
    mask, middle = (0xFFFF, 0x8000) if dtype == torch.bfloat16 else (0x0FFF, 0)
    found = np.flatnonzero((values.view(np.uint32) & mask) == middle)
    if len(found):
        exact, near = total.numpy()[found], values[found]
        side = np.where(exact > near, np.float32(np.inf), np.float32(-np.inf))
        values[found] = np.where(exact == near, near, np.nextafter(near, side))
    return single
