"""Tensors that a sharded checkpoint holds in chunks, each in a file of the process that owned it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError
from lata_lightning.numerics.chunks import ChunkReader, tensor_chunks
from lata_lightning.store.dtypes import torch_dtype
from lata_lightning.store.file_source import fill_entries, read_span
from lata_lightning.store.layout import Span, check_readable
from lata_lightning.store.sharded_metadata import Chunk, ShardedTensor
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.torch_archive import TorchArchive


class ShardedSource(TensorSource):
    """The tensors of a sharded checkpoint; the chunks of one are read, and put together, when it is asked for.

    Args:
        tensors: By name.
        location: Path of the checkpoint, for messages and provenance.
        tied: Other names of tensors that are listed once.

    Raises:
        SourceError: A tensor is of a dtype that cannot be read.
    """

    parallel = True

    def __init__(self, tensors: Mapping[str, ShardedTensor], location: str, tied: Mapping[str, str]) -> None:
        check_readable(location, {name: tensor.entry for name, tensor in tensors.items()})
        self._tensors = dict(tensors)
        self._spans: dict[Chunk, Span] = {}
        self.location, self.tied = location, dict(tied)

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._tensors[name].entry.shape

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return torch_dtype(self._tensors[name].entry.code)

    def read(self, name: str) -> Tensor:  # noqa: D102
        tensor = self._tensors[name]
        whole = torch.empty(tensor.entry.shape, dtype=self.dtype(name))
        for chunk in tensor.chunks:
            begins = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(begin, begin + size) for begin, size in begins)] = read_span(self._span(tensor, chunk))
        return whole

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        tensor = self._tensors[name]
        spans = [(chunk, self._span(tensor, chunk)) for chunk in tensor.chunks]
        shape = tensor.entry.shape
        if not shape or any(chunk.sizes[1:] != shape[1:] or span.strides is not None for chunk, span in spans):
            return tensor_chunks(self.read(name))
        row = math.prod(shape[1:])

        def piece(begin: int, end: int) -> Tensor:
            part = torch.empty(end - begin, dtype=self.dtype(name))
            for chunk, span in spans:
                first = chunk.offsets[0] * row
                low, high = max(begin, first), min(end, first + chunk.sizes[0] * row)
                if low < high:
                    fill_entries(part[low - begin : high - begin], span, low - first)
            return part

        return piece

    def _span(self, tensor: ShardedTensor, chunk: Chunk) -> Span:
        """Where the entries of a chunk lie in its file: it is a file of ``torch.save`` inside that file."""
        if chunk not in self._spans:
            archive = TorchArchive(chunk.file, chunk.begin, chunk.end)
            span = archive.tensor(archive.content)
            if span is None or (span.entry.shape, span.entry.code) != (chunk.sizes, tensor.entry.code):
                raise CorruptFileError(f"{chunk.file.path} does not hold what the .metadata beside it says. Copy the checkpoint again.")
            self._spans[chunk] = span
        return self._spans[chunk]
