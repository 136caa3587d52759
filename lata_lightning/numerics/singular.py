"""Merging matrices by their singular vectors, in float64.

Singular vectors whose singular value is rounding error are arbitrary, so they are left out: the result then does not depend on the library that
computes the decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def iso_c(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of matrices of one shape, with every singular value replaced by the mean of all of them.

    Args:
        matrices: Float64; at least one.

    Source: Iso-C, arXiv:2502.04959. As published, the mean is over as many values as the shorter side has; singular values of zero stay zero.
    """
    total = torch.stack(list(matrices)).sum(0)
    left, values, right = _directions(total, min(total.shape))
    flat: Tensor = values.sum() / min(total.shape) * left @ right
    return flat


def tsv_m(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of the leading singular directions of every matrix, an equal number of each, made orthogonal to one another.

    Args:
        matrices: Float64, of one shape; at least one.

    Source: Task Singular Vectors, arXiv:2412.00081, TSV-Merge.
    """
    own = max(1, min(matrices[0].shape) // len(matrices))
    lefts, values, rights = zip(*(_directions(matrix, own) for matrix in matrices), strict=True)
    joined: Tensor = _nearest_orthogonal(torch.cat(lefts, dim=1)) * torch.cat(values) @ _nearest_orthogonal(torch.cat(rights))
    return joined


def _directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` leading singular vectors and values of a matrix, without those whose value is rounding error."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    least = values.max() * max(matrix.shape) * torch.finfo(matrix.dtype).eps if values.numel() else 0.0
    count = min(count, int((values > least).sum()))
    return left[:, :count], values[:count], right[:count]


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix with all singular values set to 1 (its polar factor)."""
    left, _, right = _directions(matrix, min(matrix.shape))
    polar: Tensor = left @ right
    return polar
