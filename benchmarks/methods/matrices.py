"""Merges that treat the weight of every linear layer as a matrix: by its singular vectors, or by what it does to its inputs.

Matrices are the two-dimensional tensors that are asked for; every other tensor gets the plain mean of the task vectors, as in the published code of
these methods. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Vector = Mapping[str, Tensor]
Batch = Mapping[str, Tensor]
Grams = Mapping[str, Tensor]

COMMON_FRACTION = 0.8
"""Share of the directions that Iso-CTS takes from the sum; the published default."""
OFF_DIAGONAL = 0.9
"""RegMean's factor for the off-diagonal entries of a Gram matrix, which are the less certain ones."""
_RIDGE = 1e-6


def iso_c(vectors: Sequence[Vector], matrices: Collection[str]) -> dict[str, Tensor]:
    """The sum of the task vectors with all singular values of a matrix replaced by their mean.

    Source: Iso-C, arXiv:2502.04959.
    """
    return _by_matrix(vectors, matrices, lambda _, found: _flattened(found.sum(0)))


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
            return _flattened(found.sum(0))
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


def tsv_m(vectors: Sequence[Vector], matrices: Collection[str]) -> dict[str, Tensor]:
    """The leading singular directions of every task vector, an equal share of them each, made orthogonal to one another.

    Source: Task Singular Vectors, arXiv:2412.00081, TSV-Merge.
    """

    def merged(_: str, found: Tensor) -> Tensor:
        own = max(1, min(found.shape[1:]) // len(found))
        left, values, right = torch.linalg.svd(found, full_matrices=False)
        lefts, rights = torch.cat(list(left[:, :, :own]), 1), torch.cat(list(right[:, :own]))
        joined: Tensor = _nearest_orthogonal(lefts) * values[:, :own].reshape(-1) @ _nearest_orthogonal(rights)
        return joined

    return _by_matrix(vectors, matrices, merged)


def output_regression(vectors: Sequence[Vector], grams: Sequence[Grams], off_diagonal: float = OFF_DIAGONAL) -> dict[str, Tensor]:
    """For every linear layer the matrix whose outputs are closest to those of each task vector on that task's own inputs.

    Args:
        vectors: Task vectors.
        grams: For each the mean of x xᵀ over the inputs x of a layer, by tensor name (see ``input_grams``).
        off_diagonal: Factor of the off-diagonal entries of a Gram matrix.

    Returns:
        The W that minimises Σ_t E_{x∼t} ‖(W − τ_t) x‖², with the shrunk Gram matrices; for an embedding, whose inputs are single tokens, the mean of
        the rows weighted by how often each task uses the token.

    Source: RegMean, arXiv:2212.09849, applied to task vectors.
    """

    def merged(name: str, found: Tensor) -> Tensor:
        inner = [gram[name] for gram in grams]
        if inner[0].ndim == 1:
            return _solved(found.transpose(1, 2), torch.stack([counts.diag() for counts in inner])).T
        shrunk = [off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag() for gram in inner]
        return _solved(found, torch.stack(shrunk))

    return _by_matrix(vectors, grams[0], merged)


def interference_regression(vectors: Sequence[Vector], matrices: Collection[str]) -> dict[str, Tensor]:
    """As ``output_regression``, with no data: the rows of a task vector stand for the inputs that it was learned from.

    Returns:
        The exact minimum of Σ_t ‖(W − τ_t) τ_tᵀ‖² / ‖τ_t‖², which the publication approaches by 300 steps of Adam from the sum.

    Source: WUDI-Merging, arXiv:2503.08099, equation of the interference.
    """

    def merged(_: str, found: Tensor) -> Tensor:
        squares = found.square().sum((1, 2), keepdim=True)
        return _solved(found, found.transpose(1, 2) @ found / torch.where(squares > 0, squares, 1))

    return _by_matrix(vectors, matrices, merged)


@torch.no_grad()
def input_grams(model: nn.Module, batches: Sequence[Batch], names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The mean of x xᵀ over the inputs x of every linear layer, padding left out, by name of its weight.

    Args:
        model: Run on the batches as it is.
        batches: Inputs by argument name, with an ``attention_mask`` where rows are padded.
        names: Of the weights that are wanted; all unless given.

    Returns:
        Float64 matrices of shape (inputs, inputs); for an embedding the frequency of every token, shape (tokens,).
    """
    sums: dict[str, Tensor] = {}
    kept = torch.empty(0)

    def linear(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            seen = inputs[0].reshape(-1, inputs[0].shape[-1])[kept].double()
            sums[name] = sums.get(name, 0) + seen.T @ seen

        return see

    def embedding(name: str) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            tokens = torch.bincount(inputs[0].reshape(-1)[kept], minlength=module.num_embeddings).double()
            sums[name] = sums.get(name, 0) + tokens

        return see

    makers = {nn.Linear: linear, nn.Embedding: embedding}
    hooks = [
        module.register_forward_hook(makers[type(module)](f"{path}.weight"))
        for path, module in model.named_modules()
        if type(module) in makers and (names is None or f"{path}.weight" in names)
    ]
    positions = 0
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            kept = (torch.ones_like(batch["input_ids"]) if mask is None else mask).reshape(-1).bool()
            positions += int(kept.sum())
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / positions for name, total in sums.items()}


def _by_matrix(vectors: Sequence[Vector], matrices: Collection[str], merged: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in vectors[0]:
        stacked = torch.stack([vector[name].double() for vector in vectors])
        found[name] = (merged(name, stacked) if name in matrices else stacked.mean(0)).float()
    return found


def _flattened(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    flat: Tensor = values.mean() * left @ right
    return flat


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
