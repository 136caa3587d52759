"""Sources of differences: computed from two sides, or stored in an artefact; and what storing them in a lower precision costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.numerics.chunks import ChunkReader, zeros
from lata_lightning.numerics.kernels import loss
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.measure import all_finite, difference, same_entries
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Fingerprinted
from lata_lightning.vectors.entries import PrecisionLoss, factor_names
from lata_lightning.vectors.manifest import Manifest


@final
class Difference(TensorSource):
    """Tuned minus start, computed when it is read; it can hash both sides meanwhile.

    Args:
        start, tuned: Weights of the start and of the tuned model, under the same names.
        names: The tensors it has.
        identify: Whether to hash what is read.
        known: Hashes of tensors that are equal on both sides and need not be read.
        hashed: Sources of start and tuned that hash what is read of them already, where the two sides hold rows of these only.
    """

    def __init__(
        self,
        start: TensorSource,
        tuned: TensorSource,
        names: Iterable[str],
        *,
        identify: bool = True,
        known: Mapping[str, str] | None = None,
        hashed: tuple[Fingerprinted, Fingerprinted] | None = None,
    ) -> None:
        super().__init__(Origin(f"{tuned.label} − {start.label}"), parallel=start.parallel and tuned.parallel)
        self._sides, self._names, self._known = (tuned, start), tuple(names), dict(known or {})
        self._hashed = hashed
        if hashed is None and identify:
            self._hashed = start, tuned = Fingerprinted(start), Fingerprinted(tuned)
        self._start, self._tuned = start, tuned

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._names

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._start.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch.promote_types(torch.promote_types(self._start.dtype(name), self._tuned.dtype(name)), torch.float32)

    @override
    def read(self, name: str) -> Tensor:
        return _change(self._tuned.read(name).cpu(), self._start.read(name).cpu())

    @override
    def low_rank(self, name: str) -> LowRank | None:
        one, other = self._start.low_rank(name), self._tuned.low_rank(name)
        return None if one is None or other is None else other.minus(one)

    @override
    def chunks(self, name: str) -> ChunkReader:
        if self.low_rank(name) is not None:
            return super().chunks(name)
        tuned, start = self._tuned.chunks(name), self._start.chunks(name)
        return lambda begin, end: _change(tuned(begin, end), start(begin, end))

    @override
    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        if self.low_rank(name) is not None:
            return None
        return *self._sides, name

    @override
    def content_hashes(self) -> tuple[str | None, str | None]:
        if self._hashed is None:
            return None, None
        known = ({**self._known, **{name: side.hashes[name] for name in self._names if name in side.hashes}} for side in self._hashed)
        one, other = (content_hash(hashes) if len(hashes) == len(self._names) else None for hashes in known)
        return one, other


def _change(tuned: Tensor, start: Tensor) -> Tensor:
    """Return tuned minus start; zero where both are the same infinite value or NaN."""
    change = difference(tuned, start).contiguous()
    return change if all_finite(change) else change.masked_fill(same_entries(tuned, start), 0.0)


@final
class StoredDifference(TensorSource):
    """The tensors of a saved vector, in float32; frozen ones are zeros, which no file stores."""

    def __init__(self, files: TensorSource, manifest: Manifest) -> None:
        super().__init__(Origin(files.location), parallel=files.parallel)
        self._files, self._entries = files, manifest.tensors

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    @override
    def read(self, name: str) -> Tensor:
        entry, factors = self._entries[name], self.low_rank(name)
        if factors is not None:
            return factors.dense()
        return torch.zeros(entry.shape) if entry.unchanged else self._files.read(name).float()

    @override
    def chunks(self, name: str) -> ChunkReader:
        entry = self._entries[name]
        if entry.unchanged:
            return zeros(torch.float32)
        if entry.factors is not None:
            return super().chunks(name)
        stored = self._files.chunks(name)
        return lambda begin, end: stored(begin, end).float()

    @override
    def low_rank(self, name: str) -> LowRank | None:
        entry = self._entries[name]
        if entry.factors is None:
            return None
        sides = [tuple(self._files.read(stored).float() for stored in factor_names(name, index)) for index in range(len(entry.factors))]
        parts = (Factors(left, right, stored.scale) for (left, right), stored in zip(sides, entry.factors, strict=True))
        return LowRank(entry.shape, tuple(parts))


class LossMeter:
    """Sums for a PrecisionLoss over the chunks of one tensor, or over many tensors."""

    def __init__(self) -> None:
        self._inner = self._full = self._lower = 0.0
        self._nonzero = self._lost = 0
        self._used = False

    def add(self, full: Tensor, lower: Tensor) -> None:
        """Add one chunk of a flattened tensor, as it was and as it is stored."""
        self._used = True
        inner, square, lower_square, nonzero, lost = loss(full.numpy(), lower.to(full.dtype).numpy())
        self._inner += inner
        self._full += square
        self._lower += lower_square
        self._nonzero += nonzero
        self._lost += lost

    def add_sums(self, other: LossMeter) -> None:
        """Add the sums of another meter."""
        self._used = self._used or other._used
        self._inner += other._inner
        self._full += other._full
        self._lower += other._lower
        self._nonzero += other._nonzero
        self._lost += other._lost

    def add_factors(self, full: LowRank, lower: LowRank) -> None:
        """Add one tensor that is stored as factors; entries that became zero are counted in the factors."""
        self._used = True
        self._inner += full.inner(lower).item()
        self._full += full.square().item()
        self._lower += lower.square().item()
        for one, other in zip(full.parts, lower.parts, strict=True):
            for before, after in ((one.left, other.left), (one.right, other.right)):
                self._nonzero += int(torch.count_nonzero(before))
                self._lost += int(torch.count_nonzero((before != 0) & (after == 0)))

    def result(self) -> PrecisionLoss | None:
        """Return the loss over all tensors; None if none was stored below its precision."""
        if not self._used:
            return None
        norms = (self._full * self._lower) ** 0.5
        return PrecisionLoss(self._lost / self._nonzero if self._nonzero else 0.0, self._inner / norms if norms else None)
