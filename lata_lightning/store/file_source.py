"""Tensors in files, read chunk by chunk at their offsets."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.numerics.chunks import ChunkReader
from lata_lightning.store.descriptors import DESCRIPTORS, fill
from lata_lightning.store.dtypes import item_size, torch_dtype
from lata_lightning.store.layout import Entry, Span, check_readable, joined, safetensors_spans
from lata_lightning.store.sources import IN_MEMORY, Origin, TensorSource


class InFiles(TensorSource):
    """Tensors in files, of which headers tell the shapes and dtypes.

    Args:
        entries: Shape and dtype of each tensor.
        origin: Where they come from.
        tied: Other names of tensors that are listed once.

    Raises:
        SourceError: A tensor has a dtype that cannot be read.
    """

    def __init__(self, entries: Mapping[str, Entry], origin: Origin, tied: Mapping[str, str] | None) -> None:
        super().__init__(origin, tied=tied, parallel=True)
        check_readable(origin.location or "the file", entries)
        self._entries = dict(entries)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._entries[name].code)


@final
class FileSource(InFiles):
    """Tensors in one or several files; a tensor, or a range of one, is read when it is asked for.

    Files are read, not mapped into memory: the pages of a map count as memory of the process until it ends, and a map of a file that is cut short
    meanwhile kills it.

    Args:
        spans: Location of each tensor, by name.
        origin, tied: As for ``InFiles``.
    """

    def __init__(self, spans: Mapping[str, Span], origin: Origin = IN_MEMORY, tied: Mapping[str, str] | None = None) -> None:
        super().__init__({name: span.entry for name, span in spans.items()}, origin, tied)
        self._spans = dict(spans)
        weakref.finalize(self, DESCRIPTORS.close, {span.file for span in spans.values()})

    @override
    def read(self, name: str) -> Tensor:
        return read_span(self._spans[name])

    @override
    def chunks(self, name: str) -> ChunkReader:
        span = self._spans[name]
        return super().chunks(name) if span.strides is not None else load_span(span)

    @override
    def byte_range(self, name: str) -> Hashable:
        file, begin, entry, strides = self._spans[name]
        return (file.device, file.number, begin, entry, strides)


def open_safetensors(files: Iterable[Path], location: str | Path | None = None) -> FileSource:
    """Return the tensors of one or several safetensors files.

    Raises:
        CorruptFileError: A file is missing or damaged, or two have different values of one tensor.
        SourceError: A file cannot be read, or holds a dtype that cannot be read.
    """
    return FileSource(joined(safetensors_spans(file) for file in files), Origin(None if location is None else str(location)))


def read_span(span: Span) -> Tensor:
    """Return a whole tensor, contiguous."""
    (shape, code), strides = span.entry, span.strides
    dtype = torch_dtype(code)
    if strides is None:
        tensor = torch.empty(shape, dtype=dtype)
        fill_entries(tensor, span, 0)
        return tensor
    extent = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    flat = torch.empty(extent, dtype=dtype)
    fill_entries(flat, span, 0)
    return flat.as_strided(shape, strides).contiguous()


def load_span(span: Span) -> ChunkReader:
    """Return a reader of the chunks of a contiguous tensor; what a call returns is overwritten by the next."""
    dtype = torch_dtype(span.entry.code)
    buffer = torch.empty(0, dtype=dtype)

    def piece(begin: int, end: int) -> Tensor:
        nonlocal buffer
        if buffer.numel() < end - begin:
            buffer = torch.empty(end - begin, dtype=dtype)
        part = buffer[: end - begin]
        fill_entries(part, span, begin)
        return part

    return piece


def fill_entries(tensor: Tensor, span: Span, first: int) -> None:
    """Fill a contiguous tensor with the entries of a contiguous span, from one of them on."""
    if tensor.numel():
        target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        fill(target, span.file, span.begin + first * item_size(span.entry.code))
