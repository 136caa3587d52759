"""Sources of differences: computed from two sides, stored in an artefact, or scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lata_lightning.numerics.chunks import ChunkReader, zeros
from lata_lightning.numerics.kernels import loss
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.measure import all_finite, difference, same_entries
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.sources import Fingerprinted, TensorSource
from lata_lightning.vectors.entries import PrecisionLoss, factor_names
from lata_lightning.vectors.manifest import Manifest


class Difference(TensorSource):
    """Tuned minus start, computed when it is read; notes the hashes of both sides if it is to identify them.

    Args:
        start, tuned: Both under one set of names.
        names: The tensors to hold.
        identify: Whether to hash what is read.
        known: Hashes of tensors that are equal on both sides and need not be read.
    """

    def __init__(
        self,
        start: TensorSource,
        tuned: TensorSource,
        names: Iterable[str],
        *,
        identify: bool = True,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self._start, self._tuned = (Fingerprinted(start), Fingerprinted(tuned)) if identify else (start, tuned)
        self._names, self._known = tuple(names), dict(known or {})
        self.location = f"{tuned.label} − {start.label}"
        self.parallel = start.parallel and tuned.parallel

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._start.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return torch.promote_types(torch.promote_types(self._start.dtype(name), self._tuned.dtype(name)), torch.float32)

    def read(self, name: str) -> Tensor:  # noqa: D102
        return _change(self._tuned.read(name).cpu(), self._start.read(name).cpu())

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        if slices is None:
            return self.read(name)
        return _change(self._tuned.read_slice(name, slices).cpu(), self._start.read_slice(name, slices).cpu())

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        one, other = self._start.low_rank(name), self._tuned.low_rank(name)
        return None if one is None or other is None else other.minus(one)

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        if self.low_rank(name) is not None:
            return super().chunks(name)
        tuned, start = self._tuned.chunks(name), self._start.chunks(name)
        return lambda begin, end: _change(tuned(begin, end), start(begin, end))

    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:  # noqa: D102
        if self.low_rank(name) is not None:
            return None
        tuned, start = ((side.source if isinstance(side, Fingerprinted) else side) for side in (self._tuned, self._start))
        return tuned, start, name

    def content_hashes(self) -> tuple[str | None, str | None]:
        """Content hash of start and tuned; None as long as not every tensor has been read."""
        sides = ({**self._known, **side.hashes} if isinstance(side, Fingerprinted) else {} for side in (self._start, self._tuned))
        one, other = (content_hash(hashes) if len(hashes) == len(self._names) else None for hashes in sides)
        return one, other


def _change(tuned: Tensor, start: Tensor) -> Tensor:
    """Tuned minus start; zero where both are infinite or NaN and the same."""
    found = difference(tuned, start).contiguous()
    return found if all_finite(found) else found.masked_fill(same_entries(tuned, start), 0.0)


class Stored(TensorSource):
    """The tensors of an artefact, in float32; frozen ones are zeros that no file holds."""

    def __init__(self, files: TensorSource, manifest: Manifest) -> None:
        self._files, self._entries = files, manifest.tensors
        self.location, self.parallel = files.location, files.parallel

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return torch.float32

    def read(self, name: str) -> Tensor:  # noqa: D102
        entry, factors = self._entries[name], self.low_rank(name)
        if factors is not None:
            return factors.dense()
        return torch.zeros(entry.shape) if entry.unchanged else self._files.read(name).float()

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        if self._entries[name].unchanged:
            return torch.zeros(()).expand(self.shape(name))[slices or ...].contiguous()
        if slices is None or self._entries[name].factors is not None:
            return super().read_slice(name, slices)
        return self._files.read_slice(name, slices).float()

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        entry = self._entries[name]
        if entry.unchanged:
            return zeros(torch.float32)
        if entry.factors is not None:
            return super().chunks(name)
        stored = self._files.chunks(name)
        return lambda begin, end: stored(begin, end).float()

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        entry = self._entries[name]
        if entry.factors is None:
            return None
        sides = [tuple(self._files.read(stored).float() for stored in factor_names(name, index)) for index in range(len(entry.factors))]
        parts = (Factors(left, right, held.scale) for (left, right), held in zip(sides, entry.factors, strict=True))
        return LowRank(entry.shape, tuple(parts))


class Scaled(TensorSource):
    """The tensors of a source, each times a factor of its own."""

    def __init__(self, source: TensorSource, factor_of: Callable[[str], float], location: str) -> None:
        self._source, self._factor_of = source, factor_of
        self.location, self.parallel = location, source.parallel

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._source.names

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._source.dtype(name)

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self._source.read(name) * self._factor_of(name)

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        if self.low_rank(name) is not None:
            return super().chunks(name)
        load, factor = self._source.chunks(name), self._factor_of(name)
        return lambda begin, end: load(begin, end) * factor

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        factors = self._source.low_rank(name)
        return None if factors is None else factors.scaled(self._factor_of(name))


class Chosen(TensorSource):
    """Tensors of several sources, each read from the source that is chosen for its name.

    Args:
        source_of: The source of each tensor, which knows it by the same name.
        location: What they are together, for messages.
    """

    def __init__(self, source_of: Mapping[str, TensorSource], location: str) -> None:
        self._source_of = dict(source_of)
        self.location, self.parallel = location, all(source.parallel for source in source_of.values())

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._source_of)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._source_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._source_of[name].dtype(name)

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self._source_of[name].read(name)

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        return self._source_of[name].read_slice(name, slices)

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        return self._source_of[name].chunks(name)

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        return self._source_of[name].low_rank(name)

    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:  # noqa: D102
        return self._source_of[name].sides(name)


class LossMeter:
    """Sums for PrecisionLoss over the pieces of one tensor, or over many tensors."""

    def __init__(self) -> None:
        self._inner = self._full = self._lower = 0.0
        self._nonzero = self._lost = 0
        self._used = False

    def add(self, full: Tensor, lower: Tensor) -> None:
        """Take in one piece of a flattened tensor, as it was and as it is stored."""
        self._used = True
        inner, square, lower_square, nonzero, lost = loss(full.numpy(), lower.to(full.dtype).numpy())
        self._inner += inner
        self._full += square
        self._lower += lower_square
        self._nonzero += nonzero
        self._lost += lost

    def take(self, other: LossMeter) -> None:
        """Take in what another meter has seen."""
        self._used = self._used or other._used
        self._inner += other._inner
        self._full += other._full
        self._lower += other._lower
        self._nonzero += other._nonzero
        self._lost += other._lost

    def add_factors(self, full: LowRank, lower: LowRank) -> None:
        """Take in one tensor held as factors; entries that became zero are counted in the factors."""
        self._used = True
        self._inner += full.inner(lower).item()
        self._full += full.square().item()
        self._lower += lower.square().item()
        for one, other in zip(full.parts, lower.parts, strict=True):
            for before, after in ((one.left, other.left), (one.right, other.right)):
                self._nonzero += int(torch.count_nonzero(before))
                self._lost += int(torch.count_nonzero((before != 0) & (after == 0)))

    def result(self) -> PrecisionLoss | None:
        """The loss over all tensors; None if none was stored below its precision."""
        if not self._used:
            return None
        norms = (self._full * self._lower) ** 0.5
        return PrecisionLoss(self._lost / self._nonzero if self._nonzero else 0.0, self._inner / norms if norms else None)
