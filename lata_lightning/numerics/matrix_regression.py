"""Merging the matrices of several task vectors into one, in closed form and without samples.

With τ_t the matrices (rows are outputs, columns inputs), C_t = τ_tᵀτ_t as the estimate of the Gram matrix of their inputs, and P the prior, it is

    W = argmin Σ_t ‖(W − τ_t) τ_tᵀ‖² + λ ‖W − P‖² = (Σ_t τ_t C_t + λ P) (Σ_t C_t + λ I)⁻¹.

Suffixes of names give the axes: ``o`` outputs, ``i`` inputs, ``k`` the rows of all vectors together. Where all vectors together have fewer rows than
there are inputs, the same matrix comes from a smaller system with one unknown per row: with S the rows of all vectors stacked, S (Sᵀ S + λ I)⁻¹ equals
(S Sᵀ + λ I)⁻¹ S. A vector stored as factors counts by its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.numerics.chunks import ChunkReader
from lata_lightning.numerics.combine import NOT_FINITE
from lata_lightning.numerics.low_rank import Factors, LowRank

Prior = Literal["sum", "mean"]
# Entries of the largest block of rows or columns that is converted to float64 at once.
_BLOCK = 1 << 22
_STEPS = 30


@dataclass(frozen=True)
class Operand:
    """The matrix of one vector.

    Attributes:
        first: Reader of its entries, row by row, for the first pass.
        again: Reader of the same entries for the second pass.
        factors: The same matrix as low-rank factors, if it is stored so; otherwise None.
    """

    first: ChunkReader
    again: ChunkReader
    factors: LowRank | None = None


@dataclass
class Figures:
    """Measurements taken while a matrix is solved; those of several matrices add up.

    Attributes:
        lost: For each vector ‖(W − τ_t) τ_tᵀ‖², how much the merge changes its effect on its own inputs.
        own: For each vector ‖τ_t τ_tᵀ‖², its whole effect there.
        condition: Upper bound on the condition number of the system; the largest over several matrices. 0 if there was no system to solve.
    """

    lost: list[float]
    own: list[float]
    condition: float = 0.0

    @classmethod
    def empty(cls, vectors: int) -> Figures:
        """Return the figures before the first matrix."""
        return cls([0.0] * vectors, [0.0] * vectors)


@dataclass(frozen=True)
class Settings:
    """How a matrix is solved.

    Attributes:
        ridge: λ in units of the mean of the diagonal of Σ C_t; positive.
        prior: Whether P is the sum of the vectors or their mean.
        device: Device to compute on.
        precision: Dtype of products and solves.
    """

    ridge: float = 1.0
    prior: Prior = "sum"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if not 0 < self.ridge < float("inf"):
            raise LataError(f"the ridge must be positive and finite, got {self.ridge}")
        if self.prior not in ("sum", "mean"):
            raise LataError(f"unknown prior {self.prior!r}; choose one of sum, mean")

    def penalty(self, trace: float, inputs: int) -> float:
        """Return λ, from the trace of Σ C_t."""
        return self.ridge * trace / inputs

    def share(self, vectors: int) -> float:
        """Return the factor of every vector in the prior, from the number of vectors that are not zero."""
        return 1.0 if self.prior == "sum" else 1.0 / vectors


def solved_in_rows(operands: Sequence[Operand], shape: tuple[int, int]) -> bool:
    """Return whether the system has one unknown per row of the vectors, and not one per input."""
    return _all_factors(operands) or sum(_height(operand, shape[0]) for operand in operands) < shape[1]


def working_bytes(operands: Sequence[Operand], shape: tuple[int, int]) -> int:
    """Return an upper bound, in bytes, on the memory that solving a matrix takes."""
    outputs, inputs = shape
    height = sum(_height(operand, outputs) for operand in operands)
    if solved_in_rows(operands, shape):
        return 8 * (2 * height * height + 3 * outputs * height + 2 * _BLOCK) + 4 * (height + outputs) * inputs
    return 8 * ((2 * len(operands) + 2) * inputs * inputs + 4 * max(_BLOCK, inputs))


def regressed(operands: Sequence[Operand], shape: tuple[int, int], settings: Settings, figures: Figures) -> Iterator[Tensor]:
    """Yield the merged matrix in blocks of rows, from the top, float32 on the CPU.

    Args:
        operands: The matrices of the vectors; at least one.
        shape: Outputs and inputs.
        settings: How to solve.
        figures: The measurements are added to it after the last block.

    Raises:
        CorruptFileError: An entry is not finite.
        LataError: The ridge is lost in rounding.
    """
    if solved_in_rows(operands, shape):
        return _by_rows(operands, shape, settings, figures)
    return _by_inputs(operands, shape, settings, figures)


def regressed_factors(matrices: Sequence[LowRank], shape: tuple[int, int], settings: Settings, figures: Figures) -> LowRank:
    """Return what ``regressed`` does for vectors that are all stored as factors, as factors whose rank is the sum of theirs.

    Args:
        matrices: One for each vector, each of this shape.
        shape: Outputs and inputs.
        settings: How to solve.
        figures: The measurements are added to it.
    """
    lefts, rights = zip(*(factors.joined() for factors in matrices), strict=True)
    triangles, sides = [], []
    for left, right in zip(lefts, rights, strict=True):
        orthonormal, triangle = torch.linalg.qr(left.to(settings.device, settings.precision))
        triangles.append(triangle)
        sides.append(_Side(orthonormal, triangle @ right.to(settings.device, settings.precision)))
    solution = _solve_rows(sides, shape, settings, figures)
    if solution is None:
        return LowRank(shape, ())
    blocks = torch.split(solution, [len(side.rows_ki) for side in sides], dim=1)
    left = torch.cat([block @ triangle for block, triangle in zip(blocks, triangles, strict=True)], dim=1)
    return LowRank(shape, (Factors(left.double().cpu(), torch.cat(list(rights)).cpu()),))


def _by_inputs(operands: Sequence[Operand], shape: tuple[int, int], settings: Settings, figures: Figures) -> Iterator[Tensor]:
    outputs, inputs = shape
    step = max(1, _BLOCK // max(inputs, 1))
    blocks = [(begin, min(begin + step, outputs)) for begin in range(0, outputs, step)]

    def read(load: ChunkReader, begin: int, end: int) -> Tensor:
        return load(begin * inputs, end * inputs).to(settings.device, settings.precision).reshape(-1, inputs)

    grams = [torch.zeros(inputs, inputs, dtype=settings.precision, device=settings.device) for _ in operands]
    for begin, end in blocks:
        for gram, operand in zip(grams, operands, strict=True):
            rows = read(operand.first, begin, end)
            gram.addmm_(rows.T, rows)
    traces = [_finite(gram.trace()) for gram in grams]
    if sum(trace > 0 for trace in traces) < 2:
        for begin, end in blocks:
            yield reduce(torch.add, (operand.again(begin * inputs, end * inputs).float() for operand in operands)).reshape(-1, inputs)
        return
    penalty, share = settings.penalty(sum(traces), inputs), settings.share(sum(trace > 0 for trace in traces))
    total = reduce(torch.add, grams)
    figures.condition = max(figures.condition, _condition(total, penalty))
    factor = _cholesky(total, penalty, settings.ridge)
    # W = Σ τ_t X_t.
    steps = [torch.cholesky_solve(_plus_diagonal(gram, penalty * share), factor).T for gram in grams]
    lost = torch.zeros(len(operands), dtype=torch.float64, device=settings.device)
    for begin, end in blocks:
        parts = [read(operand.again, begin, end) for operand in operands]
        merged = reduce(torch.add, (part @ matrix for part, matrix in zip(parts, steps, strict=True)))
        for number, (part, gram) in enumerate(zip(parts, grams, strict=True)):
            change = merged - part
            lost[number] += ((change @ gram) * change).sum()
        yield merged.float().cpu()
    _add(figures, lost, [gram.square().sum() for gram in grams])


@dataclass(frozen=True)
class _Side:
    """A vector as orthonormal_ok @ rows_ki, where None stands for the identity."""

    orthonormal_ok: Tensor | None
    rows_ki: Tensor


def _by_rows(operands: Sequence[Operand], shape: tuple[int, int], settings: Settings, figures: Figures) -> Iterator[Tensor]:
    outputs, inputs = shape
    sides = []
    for operand in operands:
        if operand.factors is not None and _height(operand, outputs) < outputs:
            left, right = (side.to(settings.device, settings.precision) for side in operand.factors.joined())
            orthonormal, triangle = torch.linalg.qr(left)
            sides.append(_Side(orthonormal, triangle @ right))
        else:
            # In its stored precision, because every thread has copies of it.
            rows = operand.first(0, outputs * inputs).reshape(outputs, inputs)
            sides.append(_Side(None, rows.to(settings.device, copy=True)))
    solution = _solve_rows(sides, shape, settings, figures)
    merged = torch.zeros(shape)
    if solution is not None:
        blocks = torch.split(solution, [len(side.rows_ki) for side in sides], dim=1)
        for begin, end in _columns(sides, inputs):
            panel = (block @ side.rows_ki[:, begin:end].to(settings.precision) for block, side in zip(blocks, sides, strict=True))
            merged[:, begin:end] = reduce(torch.add, panel)
    yield merged


def _solve_rows(sides: Sequence[_Side], shape: tuple[int, int], settings: Settings, figures: Figures) -> Tensor | None:
    """Return the matrix B_ok for which W = B_ok S_ki, with S the rows of all sides; None if all are zero."""
    outputs, inputs = shape
    edges = [0, *accumulate(len(side.rows_ki) for side in sides)]
    spans = [slice(begin, end) for begin, end in pairwise(edges)]
    gram = torch.zeros(edges[-1], edges[-1], dtype=settings.precision, device=settings.device)
    for begin, end in _columns(sides, inputs):
        panels = [side.rows_ki[:, begin:end].to(settings.precision) for side in sides]
        for number, panel in enumerate(panels):
            for other in range(number + 1):
                gram[spans[number], spans[other]].addmm_(panel, panels[other].T)
    for number, span in enumerate(spans):
        for before in spans[:number]:
            gram[before, span] = gram[span, before].T
    traces = [_finite(gram[span, span].trace()) for span in spans]
    acting = [trace > 0 for trace in traces]
    if not any(acting):
        return None
    aims = torch.zeros(outputs, edges[-1], dtype=settings.precision, device=settings.device)
    if sum(acting) == 1:
        side, span = sides[acting.index(True)], spans[acting.index(True)]
        aims[:, span] = _lifted(side, torch.eye(len(side.rows_ki), dtype=settings.precision, device=settings.device))
        return aims
    penalty, share = settings.penalty(sum(traces), inputs), settings.share(sum(acting))
    for side, span in zip(sides, spans, strict=True):
        aims[:, span] = _lifted(side, _plus_diagonal(gram[span, span], penalty * share))
    figures.condition = max(figures.condition, _condition(gram, penalty))
    solution = torch.cholesky_solve(aims.T, _cholesky(gram, penalty, settings.ridge)).T
    del aims
    lost = [(solution @ gram[:, span] - _lifted(side, gram[span, span])).square().sum() for side, span in zip(sides, spans, strict=True)]
    _add(figures, lost, [gram[span, span].square().sum() for span in spans])
    return solution


def _lifted(side: _Side, matrix_kk: Tensor) -> Tensor:
    return matrix_kk if side.orthonormal_ok is None else side.orthonormal_ok @ matrix_kk


def _columns(sides: Sequence[_Side], inputs: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, sum(len(side.rows_ki) for side in sides)))
    for begin in range(0, inputs, step):
        yield begin, min(begin + step, inputs)


def _all_factors(operands: Sequence[Operand]) -> bool:
    return all(operand.factors is not None for operand in operands)


def _height(operand: Operand, outputs: int) -> int:
    return outputs if operand.factors is None else min(operand.factors.rank, outputs)


def _plus_diagonal(matrix: Tensor, number: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(number)
    return shifted


def _cholesky(matrix: Tensor, penalty: float, ridge: float) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(_plus_diagonal(matrix, penalty))
    if failed:
        raise LataError(f"the ridge {ridge:g} is lost in rounding beside the vectors, which do not span all directions. Give a larger one.")
    return factor


def _condition(matrix: Tensor, penalty: float) -> float:
    """Return 1 + largest eigenvalue / penalty, by power iteration: a bound on the condition number of a semidefinite matrix plus penalty · I."""
    direction = torch.linspace(1.0, 2.0, len(matrix), dtype=matrix.dtype, device=matrix.device)
    largest = 0.0
    for _ in range(_STEPS):
        image = matrix @ direction
        largest = float(image.norm() / direction.norm())
        if largest == 0:
            break
        direction = image / image.norm()
    return 1.0 + largest / penalty


def _finite(trace: Tensor) -> float:
    if not torch.isfinite(trace):
        raise CorruptFileError(NOT_FINITE)
    return float(trace)


def _add(figures: Figures, lost: Sequence[Tensor] | Tensor, own: Sequence[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(lost, own, strict=True)):
        # Where nothing is lost, rounding may leave a negative number.
        figures.lost[number] += max(0.0, float(one))
        figures.own[number] += float(other)
