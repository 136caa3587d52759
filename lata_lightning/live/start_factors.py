"""The factors that adapters add to tensors when training starts, where they do not start at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.hashing import value_sums


class StartFactors:
    """Copies of the factors that training starts from, by the name of the tensor they add to.

    Adapters of most kinds start at zero, and of those nothing is copied. The others start from a decomposition of the weights (PiSSA, OLoRA), or from an
    earlier round of training. Every process has all copies, as any of them may be asked to export, and factors are small.
    """

    def __init__(self) -> None:
        self._factors: dict[str, LowRank] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._factors

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors whose adapters do not start at zero."""
        return frozenset(self._factors)

    def capture(self, name: str, added: LowRank) -> None:
        """Take what an adapter adds now as its start."""
        self._factors.pop(name, None)
        if added.any():
            self._factors[name] = added.copy()

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Round the factors of a tensor to the precision in which the trainer now has them."""
        if name in self._factors:
            self._factors[name] = self._factors[name].stored_as(dtype)

    def discard(self, name: str) -> None:
        """Take zero as the start of a tensor's adapter."""
        self._factors.pop(name, None)

    def since(self, name: str, added: LowRank) -> LowRank:
        """Return what an adapter has gained since its start.

        Args:
            name: The tensor it adds to.
            added: What it adds now.
        """
        before = self._factors.get(name)
        if before is None:
            return added
        return LowRank(added.shape, ()) if added.equals(before) else added.since(before)

    def differ(self, name: str, added: LowRank) -> bool:
        """Whether an adapter adds something else than at its start."""
        before = self._factors.get(name)
        return added.any() if before is None else not added.equals(before)

    def value_sums(self, name: str) -> Tensor:
        """Return the two sums over the bits of a tensor's start factors; zeros where they start at zero."""
        sums = torch.zeros(2, dtype=torch.int64)
        for part in self._factors[name].parts if name in self._factors else ():
            sums += value_sums(part.left) + value_sums(part.right)
        return sums
