"""Named tensors, wherever they lie: Hugging Face directories, safetensors files, Lightning checkpoints, state dicts."""

from __future__ import annotations

import json
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.low_rank import LowRank
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.directories import file_layout
from lata_lightning.store.hashing import hash_values

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source(ABC):
    """Tensors by name, each read when it is asked for.

    Attributes:
        location: Where they come from, for messages and provenance; None for tensors in memory.
        revision: Commit of a hub repository.
        directory: The Hugging Face directory they lie in, with its config and tokenizer files.
        config: Content of the directory's config.json.
        tied: Other names of tensors that the source holds once: alias to the name in ``names``.
    """

    location: str | None = None
    revision: str | None = None
    directory: Path | None = None
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = {}

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which they lie."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:
        """A part of a tensor; all of it for None."""
        return self.read(name) if slices is None else self.read(name)[slices]

    def low_rank(self, name: str) -> LowRank | None:
        """The tensor as factors, where the source holds it so; None otherwise."""
        return None

    @property
    def label(self) -> str:
        """Short name for messages."""
        return self.location or "the weights in memory"


class SafetensorsSource(Source):
    """One or several safetensors files; a tensor, or the rows of one that are asked for, is read when it is asked for.

    Reads go to the file and not through a memory map: pages of a map count as memory of the process until it ends, and a map of a file that is cut
    short meanwhile kills it.
    """

    def __init__(self, files: list[Path]) -> None:
        self._layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._place: dict[str, tuple[int, int]] = {}
        for path in files:
            entries = file_layout(path)
            try:
                layout = {name: (entry.shape, DTYPES[entry.code]) for name, entry in entries.items()}
            except KeyError as error:
                raise SourceError(f"{path} holds tensors of dtype {error}, which are not supported") from error
            descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            # Where the tensors begin the library does not tell.
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = json.loads(os.pread(descriptor, length, 8))
            self._layout |= layout
            self._place |= {name: (descriptor, 8 + length + header[name]["data_offsets"][0]) for name in layout}

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._layout)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._layout[name][0]

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._layout[name][1]

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self._rows(name, self.shape(name), 0)

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        shape = self.shape(name)
        if not slices or any((part.start, part.stop) != (0, length) for part, length in zip(slices[1:], shape[1:], strict=False)):
            return super().read_slice(name, slices)
        first, last = slices[0].start, slices[0].stop
        return self._rows(name, (last - first, *shape[1:]), first)

    def _rows(self, name: str, shape: tuple[int, ...], first: int) -> Tensor:
        """Whole rows of a tensor, from one of them on."""
        tensor = torch.empty(shape, dtype=self.dtype(name))
        if tensor.numel():
            descriptor, begin = self._place[name]
            rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            begin += first * (len(rest) // shape[0] if shape else 0)
            while rest:
                count = os.preadv(descriptor, [rest], begin)
                if count == 0:
                    raise CorruptFileError(f"the file of {name} in {self.label} has become shorter. Copy it again.")
                rest, begin = rest[count:], begin + count
        return tensor


class StateDictSource(Source):
    """Tensors in memory: a module, a state dict, or the state dict of a checkpoint file."""

    def __init__(self, tensors: nn.Module | Mapping[str, Tensor], location: str | None = None) -> None:
        module = tensors if isinstance(tensors, nn.Module) else None
        if isinstance(tensors, nn.Module):
            config = getattr(tensors, "config", None)
            self.config = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
            tensors = tensors.state_dict()
        self.location = location
        self._tensors: dict[str, Tensor] = {}
        tied = {}
        first_at: dict[tuple[Any, ...], str] = {}
        for raw_name, tensor in tensors.items():
            # Compiled submodules carry a marker in their names that no checkpoint on disk has.
            name = raw_name.replace("_orig_mod.", "")
            if not isinstance(tensor, Tensor):
                raise SourceError(f"{self.label} must map names to tensors; {name!r} is a {type(tensor).__name__}")
            storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and tensor.device.type != "meta" and storage in first_at:
                tied[name] = first_at[storage]
            else:
                first_at[storage] = name
                self._tensors[name] = tensor.detach()
        if module is not None:
            self._tensors = under_checkpoint_names(module, self._tensors)
        self.tied = tied

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:  # noqa: D102
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise SourceError(f"{name} of {self.label} is on the meta device: it has a shape and no values. Load the weights first.")
        return tensor.cpu()


class View(Source):
    """Some tensors of another source, under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self._name_of = source, dict(names)
        self.location, self.revision, self.directory, self.config = (
            source.location,
            source.revision,
            source.directory,
            source.config,
        )

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._name_of)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self.source.shape(self._name_of[name])

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self.source.dtype(self._name_of[name])

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self.source.read(self._name_of[name])

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        return self.source.read_slice(self._name_of[name], slices)

    def low_rank(self, name: str) -> LowRank | None:  # noqa: D102
        return self.source.low_rank(self._name_of[name])


class Fingerprinted(View):
    """A source that notes the hash of every tensor as it is read, so that its identity costs no pass of its own."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, {name: name for name in source.names})
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> Tensor:  # noqa: D102
        tensor = super().read(name)
        if name not in self.hashes:
            self.hashes[name] = hash_values(tensor)
        return tensor

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:  # noqa: D102
        # A part says nothing about the identity of the whole.
        return self.read(name) if slices is None else super().read_slice(name, slices)
