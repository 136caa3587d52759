"""Merges of matrices by their singular vectors, in float64.

Directions whose singular value is rounding error have no direction of their own, so they are left out: what is returned then never depends on the
library that decomposes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def iso_c(matrices: Sequence[Tensor]) -> Tensor:
    """The sum of matrices of one shape, with every singular value replaced by the mean of all of them.

    Args:
        matrices: Float64; at least one.

    Source: Iso-C, arXiv:2502.04959. The mean is over as many values as the shorter side has, as published; directions without a value stay zero.
    """
    total = torch.stack(list(matrices)).sum(0)
    left, values, right = _directions(total, min(total.shape))
    flat: Tensor = values.sum() / min(total.shape) * left @ right
    return flat


def tsv_m(matrices: Sequence[Tensor]) -> Tensor:
    """The leading singular directions of every matrix, an equal share of them each, made orthogonal to one another.

    Args:
        matrices: Float64, of one shape; at least one.

    Source: Task Singular Vectors, arXiv:2412.00081, TSV-Merge.
    """
    own = max(1, min(matrices[0].shape) // len(matrices))
    lefts, values, rights = zip(*(_directions(matrix, own) for matrix in matrices), strict=True)
    joined: Tensor = _nearest_orthogonal(torch.cat(lefts, dim=1)) * torch.cat(values) @ _nearest_orthogonal(torch.cat(rights))
    return joined


def _directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of a matrix, at most so many, without those whose value is rounding error."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    least = values.max() * max(matrix.shape) * torch.finfo(matrix.dtype).eps if values.numel() else 0.0
    kept = min(count, int((values > least).sum()))
    return left[:, :kept], values[:kept], right[:kept]


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all singular values 1 (its polar factor)."""
    left, _, right = _directions(matrix, min(matrix.shape))
    polar: Tensor = left @ right
    return polar
