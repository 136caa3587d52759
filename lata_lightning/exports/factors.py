"""Sums of differences as one pair of factors: exact for what is low-rank already, truncated for what is dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.exports.remarks import ENOUGH
from lata_lightning.numerics.low_rank import Factors, LowRank

DEFAULT_RANK = 16
Part = tuple["Tensor | LowRank", float]
"""A difference, dense or low-rank, and the factor it comes with."""


@dataclass(frozen=True)
class Truncation:
    """How far dense differences are cut down.

    Attributes:
        rank: Singular values to keep of each matrix, if no energy is given.
        energy: Share of ‖τ‖² to keep of each matrix, in (0, 1]: the smallest rank that keeps it.

    Raises:
        LataError: Both are given, or one is out of its range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise LataError(f"give a rank or an energy, not both: got {self.rank} and {self.energy}")
        if self.rank is not None and self.rank < 1:
            raise LataError(f"the rank must be at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LataError(f"the energy is a share in (0, 1], got {self.energy}")

    def kept(self, squares: Tensor) -> int:
        """How many of the squared singular values to keep; they come in descending order, in float64."""
        if self.energy is None:
            return min(self.rank or DEFAULT_RANK, len(squares))
        sums = squares.cumsum(0)
        # Values that are rounding errors of zeros are no energy to be kept.
        enough = self.energy * sums[-1] * (1 - len(squares) * torch.finfo(torch.float64).eps)
        return int((sums < enough).sum()) + 1


@dataclass(frozen=True)
class Factored:
    """A tensor as scale · left @ right, its first axis rows and the others columns.

    Attributes:
        shape: Of the tensor.
        left, right: In the dtype they are stored in.
        scale: The multiplier that the adapter's configuration stands for.
        enough: Where a part of it was cut down, the smallest rank of that part that keeps ``ENOUGH`` of its squared norm; None for exact ones.
    """

    shape: tuple[int, ...]
    left: Tensor
    right: Tensor
    scale: float
    enough: int | None = None

    @property
    def cut(self) -> bool:
        """Whether a part of it was cut down."""
        return self.enough is not None

    @property
    def rank(self) -> int:
        """Columns of ``left``."""
        return self.left.shape[1]

    @property
    def low_rank(self) -> LowRank:
        """The tensor that the stored factors make."""
        return LowRank(self.shape, (Factors(self.left, self.right, self.scale),))

    def padded(self, rank: int) -> Factored:
        """The same tensor with zeros up to a rank."""
        more = rank - self.rank
        left = torch.cat([self.left, self.left.new_zeros(self.left.shape[0], more)], dim=1)
        return replace(self, left=left, right=torch.cat([self.right, self.right.new_zeros(more, self.right.shape[1])], dim=0))


def common_scale(tensors: Iterable[LowRank]) -> float:
    """The scale that all parts share; 1 where they have several, or where there are none."""
    found = {part.scale for held in tensors for part in held.parts}
    return found.pop() if len(found) == 1 else 1.0


def factored(
    shape: tuple[int, ...],
    parts: Sequence[Part],
    truncation: Truncation,
    *,
    scale: float,
    scaled_side: Literal["left", "right"],
    dtype: torch.dtype,
) -> Factored:
    """Σ factor · part as one product of factors.

    Low-rank parts lie side by side, so their sum is exact; of each only one side is multiplied, and only if factor and scale ask for it. The sum of
    the dense parts is cut down to the singular vectors of its largest singular values, which leaves the smallest error there is for their number;
    the square root of each value goes to either side.

    Args:
        shape: Of the tensor; at least two axes.
        parts: At least one.
        truncation: For the dense parts.
        scale: Not zero; the result is divided by it, as the adapter multiplies by it.
        scaled_side: Which side takes the factors: that of lora_B.
        dtype: Of the result.

    Raises:
        CorruptFileError: A factor does not fit the dtype, or a difference is not finite.

    Source: LoRA, arXiv:2106.09685; Eckart and Young, 1936.
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    dense = [(held, factor) for held, factor in parts if isinstance(held, Tensor)]
    for held, factor in parts:
        if isinstance(held, LowRank):
            for part in held.parts:
                multiplier = factor * (part.scale / scale)
                left, right = part.left.double(), part.right.double()
                lefts.append(left * multiplier if scaled_side == "left" else left)
                rights.append(right * multiplier if scaled_side == "right" else right)
    enough = None
    if dense:
        left, right, enough = _truncated(_sum(dense).reshape(shape[0], -1), truncation)
        # Where one vector acts, its factor is applied here and not to every entry.
        multiplier = (dense[0][1] if len(dense) == 1 else 1.0) / scale
        lefts.append(left * multiplier if scaled_side == "left" else left)
        rights.append(right * multiplier if scaled_side == "right" else right)
    left, right = torch.cat(lefts, dim=1).to(dtype), torch.cat(rights, dim=0).to(dtype)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise CorruptFileError(f"its factors do not fit {dtype}, or are not finite")
    return Factored(shape, left, right, scale, enough)


def squares(parts: Sequence[Part], added: Iterable[tuple[int, int, Tensor]]) -> tuple[float, float]:
    """‖Σ factor · part − added‖² and ‖Σ factor · part‖², in float64.

    Args:
        parts: What was to be added.
        added: What was, in the blocks of rows of ``LowRank.rows`` or ``rows_between``.
    """
    streams = [held.rows() if isinstance(held, LowRank) else _rows(held) for held, _ in parts]
    error = norm = 0.0
    for _, _, values in added:
        total = torch.zeros_like(values)
        for stream, (_, factor) in zip(streams, parts, strict=True):
            total += next(stream)[2] * factor
        error += (total - values).square().sum().item()
        norm += total.square().sum().item()
    return error, norm


def rows_between(before: Tensor, after: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The blocks of rows of a difference, in float64."""
    for (begin, end, one), (_, _, other) in zip(_rows(before), _rows(after), strict=True):
        yield begin, end, other - one


def _rows(tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    matrix = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    for begin, end in LowRank(tuple(matrix.shape), ()).blocks():
        yield begin, end, matrix[begin:end].double()


def _sum(dense: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The only tensor as it is, or the weighted sum of several, in float64."""
    if len(dense) == 1:
        return dense[0][0]
    total = torch.zeros(dense[0][0].shape, dtype=torch.float64)
    for held, factor in dense:
        total += held.double() * factor
    return total


def _truncated(matrix: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, int]:
    """Left and right factor of the best approximation of a rank, in float64, and the rank that would be enough."""
    turned = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if turned else matrix
    blocks = torch.split(tall, max(1, tall.shape[1]))
    # The eigenvectors of MᵀM are the right singular vectors of M. In float64 they are exact far beyond the float32 the factors are stored in, at
    # less time than a decomposition of M in float32 takes, and without a copy of M in float64.
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for block in blocks:
        wide = block.double()
        gram.addmm_(wide.T, wide)
    if not torch.isfinite(gram).all():
        raise CorruptFileError("NaN or infinite values")
    values, vectors = torch.linalg.eigh(gram)
    squared = values.flip(0).clamp_min(0.0)
    short = vectors.flip(1)[:, : truncation.kept(squared)]
    long = torch.cat([block.double() @ short for block in blocks])
    norms = long.norm(dim=0)
    roots = norms.sqrt()
    long, short = torch.where(norms > 0, long / roots, 0.0), short * roots
    enough = Truncation(energy=ENOUGH).kept(squared)
    return (short, long.T, enough) if turned else (long, short.T, enough)


def relative(error: float, norm: float) -> float | None:
    """‖error‖ / ‖norm‖ from their squares; None where there is nothing to be wrong about."""
    return None if norm == 0 else math.sqrt(error / norm)
