"""Which entries of a tensor lie on a process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lata_lightning.store.sources import TensorSource


@dataclass(frozen=True)
class Region:
    """A range along each axis of a tensor, or one range of its entries in row-major order.

    Attributes:
        shape: Shape in which the tensor is cut: its own, or (number of entries,) for a range of entries.
        bounds: First and last index (exclusive) along each axis of ``shape``.
    """

    shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """Return the region of all entries of a tensor."""
        return cls(shape, tuple((0, length) for length in shape))

    @classmethod
    def flat(cls, count: int, begin: int, end: int) -> Region:
        """Return the region from entry ``begin`` to entry ``end`` (exclusive) of a tensor with ``count`` entries."""
        return cls((count,), ((begin, end),))

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the values in the region."""
        return tuple(end - begin for begin, end in self.bounds)

    @property
    def entries(self) -> int:
        """Number of entries in the region."""
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the region has all entries of the tensor."""
        return self.size == self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """The bounds, as an index into a tensor of ``shape``."""
        return tuple(slice(begin, end) for begin, end in self.bounds)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the values in the region, a view of a contiguous whole tensor."""
        return tensor.reshape(self.shape)[self.slices]

    def read(self, source: TensorSource, name: str) -> Tensor:
        """Read the values in the region from a source.

        Args:
            source: A source with the whole tensor.
            name: Name of the tensor in the source.

        Returns:
            Values of shape ``size``, in the dtype of the source.
        """
        own = source.shape(name)
        if self.is_whole:
            return source.read(name).reshape(self.shape)
        if self.shape == own:
            return source.read_slice(name, self.slices)
        # A range of entries: the rows that contain it are read, and what lies before and behind it is cut off.
        ((begin, end),) = self.bounds
        width = max(1, math.prod(own[1:]))
        first, last = begin // width, -(-end // width)
        rows = source.read_slice(name, (slice(first, last), *(slice(0, length) for length in own[1:])))
        return rows.reshape(-1)[begin - first * width : end - first * width]

    def overlap(self, other: Region) -> Region | None:
        """Return the entries that two regions of one tensor, cut in the same shape, have in common; None if there are none."""
        pairs = zip(self.bounds, other.bounds, strict=True)
        bounds = tuple((max(begin, other_begin), min(end, other_end)) for (begin, end), (other_begin, other_end) in pairs)
        return None if any(begin >= end for begin, end in bounds) else Region(self.shape, bounds)

    def inside(self, outer: Region) -> tuple[slice, ...]:
        """Return where this region lies in the values of another one that contains it, as an index into these."""
        return tuple(slice(begin - first, end - first) for (begin, end), (first, _) in zip(self.bounds, outer.bounds, strict=True))
