"""The weights a fine-tune starts from, kept beside the weights in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lata_lightning.callbacks.live_model import LiveModel
from lata_lightning.store.hashing import hash_values
from lata_lightning.store.sources import Source


class StartWeights(Source):
    """Start weights of the tensors that training can change; of all others the live tensor is the start weight.

    Args:
        live: The model in training.
        origin: Weights on disk to read from instead of copies in memory, under the names of the live model.

    Costs the bytes of the changing tensors in CPU memory, nothing with an ``origin``.
    """

    def __init__(self, live: LiveModel, origin: Source | None = None) -> None:
        self.live, self._origin = live, origin
        self._copies: dict[str, Tensor] = {}
        self._changing: set[str] = set()
        self._hashes: dict[str, str] = {}
        self.location = live.location if origin is None else origin.location

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self.live.names

    @property
    def changing(self) -> frozenset[str]:
        """Names of the tensors that are kept."""
        return frozenset(self._changing)

    @property
    def size(self) -> int:
        """Bytes of memory that the copies take."""
        return sum(copy.nbytes for copy in self._copies.values())

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self.live.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self.live.dtype(name)

    def read(self, name: str) -> Tensor:  # noqa: D102
        if name not in self._changing or name in self.live.adapted:
            return self.live.read(name)
        if self._origin is not None:
            # At the precision the trainer holds: a start that is finer would show as a difference that training never made.
            return self._origin.read(name).to(self.live.dtype(name))
        return self._copies[name]

    def follow(self, live: LiveModel) -> None:
        """Go on with the same start weights for the model as it now stands."""
        self.live = live

    def capture(self, names: Iterable[str]) -> None:
        """Keep the present values of tensors, in place of what was kept of them before."""
        for name in names:
            self._changing.add(name)
            self._hashes.pop(name, None)
            # Under an adapter the live tensor is frozen and stays the start.
            if self._origin is None and name not in self.live.adapted:
                self._copies[name] = self.live.read(name).to("cpu", copy=True)

    def release(self, names: Iterable[str]) -> None:
        """Keep tensors no longer: they turned out to be frozen."""
        for name in names:
            self._changing.discard(name)
            self._copies.pop(name, None)
            self._hashes.pop(name, None)

    def cast(self) -> None:
        """Round the copies to the precision in which the trainer now holds the weights."""
        for name, copy in self._copies.items():
            dtype = self.live.dtype(name)
            if copy.dtype != dtype:
                self._copies[name] = copy.to(dtype)
                self._hashes.pop(name, None)

    def changed(self) -> list[str]:
        """Kept tensors whose live value is another one."""
        return [name for name in sorted(self._changing) if not torch.equal(self.live.read(name).cpu(), self.read(name))]

    def fingerprint(self) -> Mapping[str, str]:
        """Hash of the start value of every tensor of the model, frozen ones included."""
        for name in self.names:
            if name not in self._hashes:
                self._hashes[name] = hash_values(self.read(name))
        return dict(self._hashes)
