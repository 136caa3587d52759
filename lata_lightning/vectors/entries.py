"""How each tensor of a task vector is stored, and what a lower precision cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


def factor_names(name: str, index: int) -> tuple[str, str]:
    """Return the names under which the left and right factor of one part of a tensor are stored."""
    return f"{name}.left.{index}", f"{name}.right.{index}"


@dataclass(frozen=True)
class FactorEntry:
    """One part scale · left @ right of a tensor that is stored as factors.

    Attributes:
        rank: Columns of the left factor.
        scale: Its multiplier.
        left_hash, right_hash: Hashes of the stored bytes of both factors.
    """

    rank: int
    scale: float
    left_hash: str
    right_hash: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the artefact.

    Attributes:
        shape: Its shape.
        dtype: Name of the dtype it is stored in, such as ``float32``.
        hash: Hash of its stored bytes; None if it is not stored, or stored as factors.
        unchanged: Whether the tensor was frozen: then its difference is zero and not stored.
        factors: Its parts, if it is stored as a sum of products of factors (of a LoRA run).
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str | None = None
    unchanged: bool = False
    factors: tuple[FactorEntry, ...] | None = None

    def stored(self, name: str) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """Return shape and hash of everything that is stored of a tensor of this name, by its name in the files."""
        if self.unchanged:
            return {}
        if self.factors is None:
            return {name: (self.shape, self.hash)}
        stored: dict[str, tuple[tuple[int, ...], str | None]] = {}
        for index, part in enumerate(self.factors):
            left, right = factor_names(name, index)
            stored[left] = ((self.shape[0], part.rank), part.left_hash)
            stored[right] = ((part.rank, math.prod(self.shape[1:])), part.right_hash)
        return stored


@dataclass(frozen=True)
class PrecisionLoss:
    """What storing a difference below float32 costs.

    Attributes:
        zero_fraction: Share of the nonzero entries that became zero.
        cosine: Cosine between the stored and the full-precision difference; None for a zero vector.
    """

    zero_fraction: float
    cosine: float | None
