"""Tensors assembled from rows of several sources."""

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
class AssembledRows(Wrapping):
    """A source in which some tensors are assembled from rows of several sources, one tensor at a time.

    Args:
        source: The source of all other tensors.
        axes: Axis of the rows, by name of each assembled tensor.
        size: Number of rows.
        parts: Sources, each with the numbers of the rows to take from it; later ones win. Rows of no source are zero.
    """

    def __init__(
        self, source: TensorSource, axes: Mapping[str, int], size: int, parts: Sequence[tuple[TensorSource, Iterable[int]]]
    ) -> None:
        # No tokenizer belongs to rows of several models.
        super().__init__(source, replace(source.origin, directory=None))
        self._axes, self._size = axes, size
        self._parts = [(part, torch.tensor(sorted(rows), dtype=torch.int64)) for part, rows in parts]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        axis = self._axes.get(name)
        return shape if axis is None else (*shape[:axis], self._size, *shape[axis + 1 :])

    @override
    def dtype(self, name: str) -> torch.dtype:
        dtype = super().dtype(name)
        for part, _ in self._parts if name in self._axes else ():
            dtype = torch.promote_types(dtype, part.dtype(name))
        return dtype

    @override
    def read(self, name: str) -> Tensor:
        axis = self._axes.get(name)
        if axis is None:
            return super().read(name)
        assembled = torch.zeros(self.shape(name), dtype=self.dtype(name))
        for part, rows in self._parts:
            assembled.index_copy_(axis, rows, part.read(name).index_select(axis, rows).to(assembled.dtype))
        return assembled

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
