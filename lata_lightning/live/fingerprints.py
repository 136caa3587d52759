"""Fingerprints of the start weights, by which a resumed run recognises them, and of frozen weights, by which a change of them shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from torch import Tensor

from lata_lightning.live.ranks import Ranks

Fingerprint = Mapping[str, list[int]]
"""Two sums over the bits of each tensor, by its name: the same for every number of processes."""


class Fingerprints:
    """What is known of weights by the sums over their bits.

    Every process has one. What the processes count adds up, so one reduction gives the sums of any number of tensors.

    Args:
        ranks: The processes.
        local_sums: Gives the two sums, int64 of shape (2,), of what this process counts of a tensor: of its start value, or of its present one while
            it is frozen. None where it counts nothing.
    """

    def __init__(self, ranks: Ranks, local_sums: Callable[[str], Tensor | None]) -> None:
        self._ranks, self._local_sums = ranks, local_sums
        self.start: dict[str, list[int]] = {}
        """Of every start value that was noted."""
        self._frozen: dict[str, list[int]] = {}
        self._moved: set[str] = set()

    def of(self, names: Iterable[str]) -> dict[str, list[int]]:
        """Return the sums of some tensors. Every process has to call this, with the same names."""
        listed = sorted(names)
        sums = torch.zeros(len(listed), 2, dtype=torch.int64)
        for index, name in enumerate(listed):
            local = self._local_sums(name)
            if local is not None:
                sums[index] = local
        return dict(zip(listed, self._ranks.total(sums).tolist(), strict=True))

    def note_start(self, names: Iterable[str]) -> None:
        """Note the sums of start values."""
        self.start.update(self.of(names))

    def note_frozen(self, names: Iterable[str]) -> None:
        """Note the sums of tensors that are frozen, in place of what was noted before."""
        self._frozen = self.of(names)

    def uncertain(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of which it is not certain that they are as they were while they were frozen: changed ones, and those not noted."""
        listed = list(names)
        return sorted(
            {name for name in listed if name not in self._frozen}.union(self._moved_of(name for name in listed if name in self._frozen))
        )

    def note_unfrozen(self, names: Iterable[str]) -> None:
        """Note which of some tensors were changed while they were frozen; they can change from now on."""
        self._moved.update(self._moved_of(name for name in names if name in self._frozen))

    def moved_frozen(self, changing: Set[str]) -> list[str]:
        """Return the tensors that were changed while they were frozen.

        Args:
            changing: Names of the tensors that can change by now.
        """
        return sorted(self._moved.union(self._moved_of(name for name in self._frozen if name not in changing)))

    def _moved_of(self, frozen: Iterable[str]) -> list[str]:
        return [name for name, sums in self.of(frozen).items() if sums != self._frozen[name]]
