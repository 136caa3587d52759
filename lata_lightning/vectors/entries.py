"""How each tensor of a task vector is stored, and what a lower precision cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


def factor_names(name: str, index: int) -> tuple[str, str]:
    """Names under which the left and right factor of a part of a tensor are stored."""
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
        unchanged: The tensor was frozen: its difference is zero, and it takes no room in the file.
        factors: The parts it is stored as, if it is a sum of products of factors (of a LoRA run).
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str | None = None
    unchanged: bool = False
    factors: tuple[FactorEntry, ...] | None = None

    def stored(self, name: str) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """Shape and hash by the names under which the tensor of this name lies in the files."""
        if self.unchanged:
            return {}
        if self.factors is None:
            return {name: (self.shape, self.hash)}
        found: dict[str, tuple[tuple[int, ...], str | None]] = {}
        for index, part in enumerate(self.factors):
            left, right = factor_names(name, index)
            found[left] = ((self.shape[0], part.rank), part.left_hash)
            found[right] = ((part.rank, math.prod(self.shape[1:])), part.right_hash)
        return found


@dataclass(frozen=True)
class PrecisionLoss:
    """What storing a difference below float32 cost.

    Attributes:
        zero_fraction: Share of the nonzero entries that became zero.
        cosine: Cosine between the stored and the full-precision difference; None for a zero vector.
    """

    zero_fraction: float
    cosine: float | None
