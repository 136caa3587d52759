"""Inner products of one difference with several stored vectors, in one pass over its entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import difference, tensor_sums

# Entries per chunk on an accelerator, so that no temporary of the size of a tensor is made.
_CHUNK = 1 << 22


def inner_products(vector: Tensor | LowRank, others: Sequence[Tensor | LowRank], *, subtract: Tensor | None = None) -> Tensor:
    """Return the inner product of one tensor of a vector with the same tensor of other vectors.

    Subtraction happens at the precision the weights have, never below float32; products and sums are float64.

    Args:
        vector: Tuned minus start, of any shape and floating dtype, or its factors; or the tuned weights, where ``subtract`` is given.
        others: The same tensor of each other vector, of the same shape, or its factors.
        subtract: The start weights, for a vector that does not exist yet.

    Returns:
        Float64 of shape (len(others),), on the CPU. Of factors no dense matrix is made.

    Raises:
        LayoutMismatchError: The shapes differ.
    """
    for other in others:
        if tuple(other.shape) != tuple(vector.shape):
            raise LayoutMismatchError(f"tensors of one name must have one shape, got {tuple(vector.shape)} and {tuple(other.shape)}")
    products = torch.zeros(len(others), dtype=torch.float64)
    if isinstance(vector, LowRank):
        for index, other in enumerate(others):
            products[index] = vector.inner(other) if isinstance(other, LowRank) else vector.inner_dense(other)
        return products
    dense = {index: other for index, other in enumerate(others) if not isinstance(other, LowRank)}
    if vector.device.type == "cpu":
        # The compiled pass takes the other sums for nothing, and is faster than torch is without them.
        for index, other in dense.items():
            products[index] = tensor_sums(vector, other, subtract=subtract)[0]
    elif dense:
        for index, total in zip(dense, _on_device(vector, list(dense.values()), subtract), strict=True):
            products[index] = total.cpu()
    factored = {index: other for index, other in enumerate(others) if isinstance(other, LowRank)}
    if factored:
        whole = vector if subtract is None else difference(vector, subtract.to(vector.device))
        for index, factors in factored.items():
            products[index] = factors.inner_dense(whole)
    return products


def _on_device(vector: Tensor, others: Sequence[Tensor], subtract: Tensor | None) -> list[Tensor]:
    """Return the inner products where the vector lies on an accelerator: each chunk of the start weights is brought there once."""
    flat, origin = vector.detach().reshape(-1), None if subtract is None else subtract.detach().reshape(-1)
    sides = [other.detach().reshape(-1) for other in others]
    sums = [torch.zeros((), dtype=torch.float64, device=flat.device) for _ in others]
    for begin in range(0, flat.numel(), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        gained = flat[part] if origin is None else difference(flat[part], origin[part].to(flat.device, non_blocking=True))
        gained = gained.double()
        for total, side in zip(sums, sides, strict=True):
            total += torch.dot(gained, side[part].to(flat.device, non_blocking=True).double())
    return sums
