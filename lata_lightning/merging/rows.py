"""Tensors put together from rows of several sources."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.numerics.chunks import ChunkReader, tensor_chunks
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Wrapping


@final
class Rows(Wrapping):
    """A source in which some tensors are put together from rows of several sources, one tensor at a time.

    Args:
        source: Whose other tensors are taken as they are.
        axes: Axis of the rows by tensor name.
        size: Number of rows to hold.
        pieces: Sources, each with the rows to take from it; later ones win. Rows that none gives are zero.
    """

    def __init__(
        self, source: TensorSource, axes: Mapping[str, int], size: int, pieces: Sequence[tuple[TensorSource, Iterable[int]]]
    ) -> None:
        # Rows of several models have no tokenizer of their own.
        super().__init__(source, replace(source.origin, directory=None))
        self._axes, self._size = axes, size
        self._pieces = [(piece, torch.tensor(sorted(rows), dtype=torch.int64)) for piece, rows in pieces]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        axis = self._axes.get(name)
        return shape if axis is None else (*shape[:axis], self._size, *shape[axis + 1 :])

    @override
    def dtype(self, name: str) -> torch.dtype:
        found = super().dtype(name)
        for piece, _ in self._pieces if name in self._axes else ():
            found = torch.promote_types(found, piece.dtype(name))
        return found

    @override
    def read(self, name: str) -> Tensor:
        axis = self._axes.get(name)
        if axis is None:
            return super().read(name)
        found = torch.zeros(self.shape(name), dtype=self.dtype(name))
        for piece, rows in self._pieces:
            found.index_copy_(axis, rows, piece.read(name).index_select(axis, rows).to(found.dtype))
        return found

    @override
    def low_rank(self, name: str) -> LowRank | None:
        return None if name in self._axes else super().low_rank(name)

    @override
    def chunks(self, name: str) -> ChunkReader:
        return tensor_chunks(self.read(name)) if name in self._axes else super().chunks(name)

    @override
    def byte_range(self, name: str) -> Hashable:
        return None if name in self._axes else super().byte_range(name)

    @override
    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        return None if name in self._axes else super().sides(name)
