"""Differences as low-rank factors, as LoRA trains them: inner products and rows without the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a block of rows. Blocks lie on a fixed grid, so that the values of a row never depend on which rows are asked for.
_BLOCK = 1 << 16


class Factors(NamedTuple):
    """One summand: scale · left @ right.

    Attributes:
        left: Floating, of shape (rows, rank).
        right: Floating, of shape (rank, columns).
        scale: Dimensionless.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of ``left``."""
        return self.left.shape[1]


@dataclass(frozen=True)
class LowRank:
    """A tensor that is a sum of products of factors: its first axis as rows, all others flattened to columns.

    Attributes:
        shape: Shape of the tensor; at least two axes.
        parts: The summands; none for zero. They are not copied, and never changed here.
    """

    shape: tuple[int, ...]
    parts: tuple[Factors, ...]

    @property
    def columns(self) -> int:
        """Elements per row."""
        return math.prod(self.shape[1:])

    @property
    def rank(self) -> int:
        """Sum of the ranks of the parts: an upper bound on the rank of the matrix."""
        return sum(part.rank for part in self.parts)

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.parts[0].left.device if self.parts else torch.device("cpu")

    def scaled(self, factor: float) -> LowRank:
        """Return this tensor times a number."""
        return LowRank(self.shape, tuple(Factors(part.left, part.right, part.scale * factor) for part in self.parts))

    def minus(self, other: LowRank) -> LowRank:
        """Return the difference to a tensor of the same shape; its rank is the sum of both ranks."""
        return LowRank(self.shape, (*self.parts, *other.scaled(-1.0).parts))

    def since(self, before: LowRank) -> LowRank:
        """Return how far the tensor has changed since its factors had other values: left·right − left₀·right₀.

        Where the parts correspond, it is computed as (left − left₀)·right + left₀·(right − right₀). Subtracting the products of factors that started
        large and moved little would lose most of the change in rounding. The differences are at least float32.
        """
        pairs = list(zip(self.parts, before.parts, strict=False))
        if len(self.parts) != len(before.parts) or any(now.scale != old.scale or now.rank != old.rank for now, old in pairs):
            return self.minus(before)
        parts = []
        for now, old in pairs:
            old_left, old_right = old.left.to(now.left.device), old.right.to(now.right.device)
            parts.append(Factors(_minus(now.left, old_left), now.right, now.scale))
            parts.append(Factors(old_left, _minus(now.right, old_right), now.scale))
        return LowRank(self.shape, tuple(parts))

    def copy(self) -> LowRank:
        """Return the same tensor with copies of the factors, on the CPU."""
        return LowRank(self.shape, tuple(Factors(_copied(part.left), _copied(part.right), part.scale) for part in self.parts))

    def equals(self, other: LowRank) -> bool:
        """Return whether both have the same factors, bit for bit."""
        if len(self.parts) != len(other.parts):
            return False
        pairs = zip(self.parts, other.parts, strict=True)
        return all(
            one.scale == two.scale and torch.equal(one.left.cpu(), two.left.cpu()) and torch.equal(one.right.cpu(), two.right.cpu())
            for one, two in pairs
        )

    def any(self) -> bool:
        """Return whether any part is nonzero; parts that cancel count as nonzero."""
        return any(bool(part.left.any()) and bool(part.right.any()) for part in self.parts)

    def stored_as(self, dtype: torch.dtype) -> LowRank:
        """Return the tensor with its factors rounded to a dtype."""
        return LowRank(self.shape, tuple(Factors(part.left.to(dtype), part.right.to(dtype), part.scale) for part in self.parts))

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return all parts as one product left @ right, in float64, with the scales multiplied into ``left``."""
        if not self.parts:
            return torch.zeros(self.shape[0], 0, dtype=torch.float64), torch.zeros(0, self.columns, dtype=torch.float64)
        left = torch.cat([part.left.detach().to(self.device, torch.float64) * part.scale for part in self.parts], dim=1)
        return left, torch.cat([part.right.detach().to(self.device, torch.float64) for part in self.parts], dim=0)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first and the last row (exclusive) of every block of rows."""
        step = max(1, _BLOCK // max(self.columns, 1))
        for begin in range(0, self.shape[0], step):
            yield begin, min(begin + step, self.shape[0])

    def rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the bounds of every block of rows and its values, float64 of shape (rows, columns)."""
        left, right = self.joined()
        for begin, end in self.blocks():
            yield begin, end, left[begin:end] @ right

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense tensor: products and sums in float64, rounded to the dtype."""
        dense = torch.empty(self.shape[0], self.columns, dtype=dtype, device=self.device)
        for begin, end, values in self.rows():
            dense[begin:end] = values
        return dense.reshape(self.shape)

    def square(self) -> Tensor:
        """Return ‖self‖², a float64 scalar, in rank² · (rows + columns) multiplications."""
        # Where parts nearly cancel, rounding may leave a negative number.
        return self.inner(self).clamp_min(0.0)

    def inner(self, other: LowRank) -> Tensor:
        """Return ⟨self, other⟩ of two tensors of one shape, a float64 scalar: Σ (leftᵀ left') ∘ (right right'ᵀ)."""
        (left, right), (other_left, other_right) = self.joined(), other.joined()
        device = left.device
        return ((left.T @ other_left.to(device)) * (right @ other_right.to(device).T)).sum()

    def inner_and_square(self, other: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Return ⟨self, other⟩ and ‖other‖², float64 scalars, for a dense tensor on the CPU that is read chunk by chunk, each entry once.

        Args:
            other: Returns the entries [begin, end) of the flattened tensor, of any floating dtype; ranges are asked for in order.
        """
        left, right = (side.cpu() for side in self.joined())
        turned, columns = right.T.contiguous(), self.columns
        inner, square = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for begin, end in self.blocks():
            block = other(begin * columns, end * columns).double()
            square += torch.dot(block, block)
            inner += ((block.reshape(-1, columns) @ turned) * left[begin:end]).sum()
        return inner, square

    def inner_dense(self, other: Tensor) -> Tensor:
        """Return ⟨self, other⟩ with a tensor of the same shape and any floating dtype, a float64 scalar, in rank · elements multiplications."""
        left, right = self.joined()
        turned, matrix = right.T.contiguous(), other.detach().reshape(self.shape[0], self.columns)
        inner = torch.zeros((), dtype=torch.float64, device=left.device)
        for begin, end in self.blocks():
            inner += ((matrix[begin:end].to(left.device).double() @ turned) * left[begin:end]).sum()
        return inner


def _minus(now: Tensor, before: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(now.dtype, before.dtype), torch.float32)
    return now.detach().to(wide) - before.to(wide)


def _copied(side: Tensor) -> Tensor:
    return side.detach().to("cpu", copy=True)
