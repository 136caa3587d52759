"""Sums of differences as one pair of low-rank factors: exact for low-rank differences, truncated for dense ones."""

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
Scaled = tuple["Tensor | LowRank", float]
"""A difference, dense or low-rank, and its multiplier."""


@dataclass(frozen=True)
class Truncation:
    """How dense differences are truncated.

    Attributes:
        rank: Number of singular values to keep of each matrix, if no energy is given.
        energy: Share of ‖τ‖² to keep of each matrix, in (0, 1]; the smallest rank that keeps it is taken.

    Raises:
        LataError: Both are given, or one is out of range.
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

    def rank_for(self, squares: Tensor) -> int:
        """Return the number of singular values to keep, from their squares in descending order, float64."""
        if self.energy is None:
            return min(self.rank or DEFAULT_RANK, len(squares))
        sums = squares.cumsum(0)
        # Rounding errors of zeros do not count as energy.
        enough = self.energy * sums[-1] * (1 - len(squares) * torch.finfo(torch.float64).eps)
        return int((sums < enough).sum()) + 1


@dataclass(frozen=True)
class Factored:
    """A tensor as scale · left @ right, its first axis rows and the others columns.

    Attributes:
        shape: Shape of the tensor.
        left, right: The factors, in the dtype of the file.
        scale: The multiplier in the adapter's configuration.
        enough: The smallest rank that would keep ``ENOUGH`` of the squared norm of the truncated part; None if nothing was truncated.
    """

    shape: tuple[int, ...]
    left: Tensor
    right: Tensor
    scale: float
    enough: int | None = None

    @property
    def cut(self) -> bool:
        """Whether a part of it was truncated."""
        return self.enough is not None

    @property
    def rank(self) -> int:
        """Number of columns of ``left``."""
        return self.left.shape[1]

    @property
    def low_rank(self) -> LowRank:
        """The product of the stored factors."""
        return LowRank(self.shape, (Factors(self.left, self.right, self.scale),))

    def padded(self, rank: int) -> Factored:
        """Return the same tensor with factors padded with zeros to a rank."""
        more = rank - self.rank
        left = torch.cat([self.left, self.left.new_zeros(self.left.shape[0], more)], dim=1)
        return replace(self, left=left, right=torch.cat([self.right, self.right.new_zeros(more, self.right.shape[1])], dim=0))


def common_scale(tensors: Iterable[LowRank]) -> float:
    """Return the scale that all parts share; 1 where they have different ones, or where there are none."""
    scales = {part.scale for tensor in tensors for part in tensor.parts}
    return scales.pop() if len(scales) == 1 else 1.0


def factored(
    shape: tuple[int, ...],
    differences: Sequence[Scaled],
    truncation: Truncation,
    *,
    scale: float,
    scaled_side: Literal["left", "right"],
    dtype: torch.dtype,
) -> Factored:
    """Return Σ multiplier · difference as one product of factors.

    The factors of low-rank differences are concatenated, so their sum is exact; only one side of each is multiplied. The sum of the dense differences is
    truncated to its largest singular values, which is the best approximation of that rank; the square root of each value goes to either side.

    Args:
        shape: Shape of the tensor; at least two axes.
        differences: At least one.
        truncation: How to truncate the dense ones.
        scale: The scale of the adapter, not zero; the result is divided by it, because peft multiplies by it.
        scaled_side: The side that is multiplied: that of lora_B.
        dtype: Dtype of the factors.

    Raises:
        CorruptFileError: A factor does not fit the dtype, or a difference is not finite.

    Source: LoRA, arXiv:2106.09685; Eckart and Young, 1936.
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    dense = [(difference, factor) for difference, factor in differences if isinstance(difference, Tensor)]
    for difference, factor in differences:
        if isinstance(difference, LowRank):
            for part in difference.parts:
                multiplier = factor * (part.scale / scale)
                left, right = part.left.double(), part.right.double()
                lefts.append(left * multiplier if scaled_side == "left" else left)
                rights.append(right * multiplier if scaled_side == "right" else right)
    enough = None
    if dense:
        left, right, enough = _truncated(_sum(dense).reshape(shape[0], -1), truncation)
        # The multiplier of a single dense difference is applied to the factors and not to every entry.
        multiplier = (dense[0][1] if len(dense) == 1 else 1.0) / scale
        lefts.append(left * multiplier if scaled_side == "left" else left)
        rights.append(right * multiplier if scaled_side == "right" else right)
    left, right = torch.cat(lefts, dim=1).to(dtype), torch.cat(rights, dim=0).to(dtype)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise CorruptFileError(f"its factors do not fit {dtype}, or are not finite")
    return Factored(shape, left, right, scale, enough)


def squares(differences: Sequence[Scaled], added: Iterable[tuple[int, int, Tensor]]) -> tuple[float, float]:
    """Return ‖Σ multiplier · difference − added‖² and ‖Σ multiplier · difference‖², in float64.

    Args:
        differences: What the adapter should add.
        added: What it adds, in the blocks of rows of ``LowRank.rows`` or ``rows_between``.
    """
    streams = [difference.rows() if isinstance(difference, LowRank) else _rows(difference) for difference, _ in differences]
    error = norm = 0.0
    for _, _, values in added:
        total = torch.zeros_like(values)
        for stream, (_, factor) in zip(streams, differences, strict=True):
            total += next(stream)[2] * factor
        error += (total - values).square().sum().item()
        norm += total.square().sum().item()
    return error, norm


def rows_between(before: Tensor, after: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield after − before in blocks of rows, in float64."""
    for (begin, end, one), (_, _, other) in zip(_rows(before), _rows(after), strict=True):
        yield begin, end, other - one


def _rows(tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    matrix = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    for begin, end in LowRank(tuple(matrix.shape), ()).blocks():
        yield begin, end, matrix[begin:end].double()


def _sum(dense: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return a single tensor unchanged and unscaled, or the weighted sum of several in float64."""
    if len(dense) == 1:
        return dense[0][0]
    total = torch.zeros(dense[0][0].shape, dtype=torch.float64)
    for difference, factor in dense:
        total += difference.double() * factor
    return total


def _truncated(matrix: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, int]:
    """Return left and right factor of the best low-rank approximation, in float64, and the rank that would keep ``ENOUGH``."""
    turned = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if turned else matrix
    blocks = torch.split(tall, max(1, tall.shape[1]))
    # The eigenvectors of the Gram matrix MᵀM are the right singular vectors of M. In float64 they are far more exact than the float32 of the factors. This
    # is faster than decomposing M in float32, and needs no copy of M in float64.
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for block in blocks:
        wide = block.double()
        gram.addmm_(wide.T, wide)
    if not torch.isfinite(gram).all():
        raise CorruptFileError("NaN or infinite values")
    values, vectors = torch.linalg.eigh(gram)
    squared = values.flip(0).clamp_min(0.0)
    short = vectors.flip(1)[:, : truncation.rank_for(squared)]
    long = torch.cat([block.double() @ short for block in blocks])
    norms = long.norm(dim=0)
    roots = norms.sqrt()
    long, short = torch.where(norms > 0, long / roots, 0.0), short * roots
    enough = Truncation(energy=ENOUGH).rank_for(squared)
    return (short, long.T, enough) if turned else (long, short.T, enough)


def relative(error: float, norm: float) -> float | None:
    """Return ‖error‖ / ‖τ‖ from their squares; None where τ is zero."""
    return None if norm == 0 else math.sqrt(error / norm)
