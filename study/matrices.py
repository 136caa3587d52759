"""Merges that treat the weight of every linear layer as a matrix, by its singular vectors or its rows.

Matrices are the two-dimensional tensors that are asked for; every other tensor gets the plain mean of the task vectors, as in the published code of
these methods. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from lata_lightning.numerics.singular import iso_c

Vector = Mapping[str, Tensor]

COMMON_FRACTION = 0.8
"""Share of the directions that Iso-CTS takes from the sum; the published default."""
_RIDGE = 1e-6


def iso_cts(vectors: Sequence[Vector], matrices: Collection[str], common: float = COMMON_FRACTION) -> dict[str, Tensor]:
    """Iso-C with the least directions of the sum replaced by directions of single task vectors outside the others.

    Args:
        vectors: Task vectors.
        matrices: Names of the tensors that are treated as matrices.
        common: Share of directions that are taken from the sum.

    Source: Iso-CTS, arXiv:2502.04959, algorithm 2.
    """

    def merged(_: str, found: Tensor) -> Tensor:
        rank = min(found.shape[1:])
        own = round((rank - int(rank * common)) / len(found))
        if own == 0:
            return iso_c(list(found))
        left, values, right = torch.linalg.svd(found.sum(0), full_matrices=False)
        kept = rank - own * len(found)
        lefts, all_values, rights = [left[:, :kept]], [values[:kept]], [right[:kept]]
        for matrix in found:
            outside = matrix - lefts[0] @ (lefts[0].T @ matrix)
            left, values, right = torch.linalg.svd(outside, full_matrices=False)
            lefts.append(left[:, :own])
            all_values.append(values[:own])
            rights.append(right[:own])
        return torch.cat(all_values).mean() * _nearest_orthogonal(torch.cat(lefts, 1)) @ _nearest_orthogonal(torch.cat(rights))

    return _by_matrix(vectors, matrices, merged)


def interference_regression(vectors: Sequence[Vector], matrices: Collection[str]) -> dict[str, Tensor]:
    """The matrix that does on every task vector's rows, which stand for the inputs it was learned from, what that vector does there.

    Returns:
        The exact minimum of Σ_t ‖(W − τ_t) τ_tᵀ‖² / ‖τ_t‖², which the publication approaches by 300 steps of Adam from the sum.

    Source: WUDI-Merging, arXiv:2503.08099, equation of the interference.
    """

    def merged(_: str, found: Tensor) -> Tensor:
        squares = found.square().sum((1, 2), keepdim=True)
        return _solved(found, found.transpose(1, 2) @ found / torch.where(squares > 0, squares, 1))

    return _by_matrix(vectors, matrices, merged)


def zero_on(vector: Vector, kept: Vector) -> dict[str, Tensor]:
    """What does on the rows of a vector what that vector does, and nothing on those of another one.

    Args:
        vector: What is to be taken off a model.
        kept: What must not be lost by it.

    Returns:
        For every matrix argmin ‖(W − τ) τᵀ‖² + ‖W κᵀ‖² + λ ‖W − τ‖², with λ the mean of the diagonal of τᵀτ + κᵀκ, as the merge without samples has it;
        the vector's own values for every other tensor.
    """
    found = {}
    for name in vector:
        own, other = vector[name].double(), kept[name].double()
        if own.ndim == 2:
            gram = own.T @ own
            total = gram + other.T @ other
            ridge = total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
            own = torch.linalg.solve(total + ridge, (own @ (gram + ridge)).T).T if ridge.any() else own
        found[name] = own.float()
    return found


def _by_matrix(vectors: Sequence[Vector], matrices: Collection[str], merged: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in vectors[0]:
        stacked = torch.stack([vector[name].double() for vector in vectors])
        found[name] = (merged(name, stacked) if name in matrices else stacked.mean(0)).float()
    return found


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all singular values 1 (the polar factor)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = left @ right
    return polar


def _solved(matrices: Tensor, inner: Tensor) -> Tensor:
    """The W of least Σ_t tr((W − M_t) C_t (W − M_t)ᵀ), of equally good ones nearly the smallest."""
    total = inner.sum(0)
    scale = total.diagonal().mean()
    if scale == 0:
        return matrices.mean(0)
    ridge = _RIDGE * scale * torch.eye(len(total), dtype=total.dtype)
    solved: Tensor = torch.linalg.solve(total + ridge, (matrices @ inner).sum(0).T)
    return solved.T
