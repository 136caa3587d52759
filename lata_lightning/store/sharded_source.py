"""Tensors of a sharded checkpoint, each in several chunks, in the files of the processes that owned them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.errors import CorruptFileError
from lata_lightning.numerics.chunks import ChunkReader, tensor_chunks
from lata_lightning.store.file_source import InFiles, fill_entries, read_span
from lata_lightning.store.layout import Span
from lata_lightning.store.sharded_metadata import Chunk, ShardedTensor
from lata_lightning.store.sources import Origin
from lata_lightning.store.torch_archive import TorchArchive


@final
class ShardedSource(InFiles):
    """The tensors of a sharded checkpoint; the chunks of a tensor are read and put together when it is asked for.

    Args:
        tensors: Each tensor by its name: shape, dtype, and the chunks it is stored in.
        origin, tied: As for ``InFiles``.
    """

    def __init__(self, tensors: Mapping[str, ShardedTensor], origin: Origin, tied: Mapping[str, str]) -> None:
        super().__init__({name: tensor.entry for name, tensor in tensors.items()}, origin, tied)
        self._tensors = dict(tensors)
        self._spans: dict[Chunk, Span] = {}

    @override
    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        whole = torch.empty(tensor.entry.shape, dtype=self.dtype(name))
        for chunk in tensor.chunks:
            begins = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(begin, begin + size) for begin, size in begins)] = read_span(self._span(tensor, chunk))
        return whole

    @override
    def chunks(self, name: str) -> ChunkReader:
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
        """Return the location of the entries of a chunk, which is a file of ``torch.save`` inside its file."""
        if chunk not in self._spans:
            archive = TorchArchive(chunk.file, chunk.begin, chunk.end)
            span = archive.tensor(archive.content)
            if span is None or (span.entry.shape, span.entry.code) != (chunk.sizes, tensor.entry.code):
                raise CorruptFileError(f"{chunk.file.path} does not match the .metadata of its directory. Copy the checkpoint again.")
            self._spans[chunk] = span
        return self._spans[chunk]
