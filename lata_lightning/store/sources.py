"""Named tensors that are read when they are asked for, whole or in part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.errors import SourceError
from lata_lightning.layers import unwrapped
from lata_lightning.numerics.chunks import ChunkReader, chunk_bounds, factor_chunks, in_parallel, tensor_chunks, worker_count
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.checkpoint_names import state_of, under_checkpoint_names
from lata_lightning.store.hashing import StoredHash


@dataclass(frozen=True)
class Origin:
    """Where tensors come from.

    Attributes:
        location: Path or hub id as it was given; None for tensors in memory.
        revision: Commit of a hub repository.
        directory: The Hugging Face directory that holds them, with its config and tokenizer files.
        config: Content of the config.json that belongs to them.
    """

    location: str | None = None
    revision: str | None = None
    directory: Path | None = None
    config: Mapping[str, Any] | None = None


IN_MEMORY = Origin()
"""The origin of tensors of which nothing is known but their values."""


class TensorSource(ABC):
    """Tensors by name, each read when it is asked for. A source never changes.

    Args:
        origin: Where the tensors come from.
        tied: Other names of tensors that the source lists once: alias to the name in ``names``.
        parallel: Whether several threads may read at once.
    """

    def __init__(self, origin: Origin = IN_MEMORY, *, tied: Mapping[str, str] | None = None, parallel: bool = False) -> None:
        self._origin, self._tied, self._parallel = origin, dict(tied or {}), parallel

    @property
    def origin(self) -> Origin:
        """Where the tensors come from."""
        return self._origin

    @property
    def location(self) -> str | None:
        """Path or hub id, for messages and records; None for tensors in memory."""
        return self._origin.location

    @property
    def revision(self) -> str | None:
        """Commit of a hub repository; None for whatever comes from elsewhere."""
        return self._origin.revision

    @property
    def directory(self) -> Path | None:
        """The Hugging Face directory that holds the tensors; None if there is none."""
        return self._origin.directory

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Content of the config.json that belongs to the tensors; None if there is none."""
        return self._origin.config

    @property
    def tied(self) -> Mapping[str, str]:
        """Other names of tensors that are listed once: alias to the name in ``names``."""
        return self._tied

    @property
    def parallel(self) -> bool:
        """Whether several threads may read at once."""
        return self._parallel

    @property
    def label(self) -> str:
        """Short name for messages."""
        return self.location or "the weights in memory"

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their file or module."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""

    def chunks(self, name: str) -> ChunkReader:
        """Return a function that reads a range of the flattened tensor; from files it reads that range only."""
        factors = self.low_rank(name)
        return tensor_chunks(self.read(name)) if factors is None else factor_chunks(factors)

    @final
    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:
        """Return a part of a tensor; all of it for None. Whole rows are one range, which is read by itself; for other parts the tensor is read whole."""
        if slices is None:
            return self.read(name)
        shape = self.shape(name)
        ranges = [part.indices(length) for part, length in zip(slices, shape, strict=False)]
        rows_only = (
            ranges and ranges[0][2] == 1 and all(bounds == (0, length, 1) for bounds, length in zip(ranges[1:], shape[1:], strict=False))
        )
        if not rows_only or self.low_rank(name) is not None:
            return self.read(name)[slices]
        first, last = ranges[0][0], max(ranges[0][:2])
        row = math.prod(shape[1:])
        return self.chunks(name)(first * row, last * row).reshape(last - first, *shape[1:])

    def low_rank(self, name: str) -> LowRank | None:
        """Return a tensor as factors, if the source has it as factors; None otherwise."""
        return None

    def byte_range(self, name: str) -> Hashable:
        """Return which bytes of which file a tensor is; equal values mean the same bytes. None for a tensor that is not read from a file as it is."""
        return None

    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        """Return the tuned source, the start source and the name in both, for a tensor that is computed as their difference; None for any other."""
        return None

    def content_hashes(self) -> tuple[str | None, str | None]:
        """Return the content hashes of the start and of the tuned side of a difference, as far as they were read; None for a side that is not known."""
        return None, None

    def measured(self) -> Mapping[tuple[str, str | None], Mapping[str, float | None]]:
        """Return what was measured while tensors were read, for the record: by its name and the label of the vector it is about, a number by layer."""
        return {}

    def by_tensor(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what was measured while tensors were read, by tensor and for all vectors together."""
        return {}

    def origin_name(self, name: str) -> str:
        """Return the name of a tensor in the source beneath all views of it."""
        return name


@final
class StateDictSource(TensorSource):
    """Tensors in memory: of a module, or of a state dict.

    Args:
        tensors: A module, or tensors by name.
        origin: Where they come from. The config of a module is its own, unless the origin has one.

    Raises:
        SourceError: A value is no tensor.
    """

    def __init__(self, tensors: nn.Module | Mapping[str, Tensor], origin: Origin = IN_MEMORY) -> None:
        module = tensors if isinstance(tensors, nn.Module) else None
        if isinstance(tensors, nn.Module):
            config = getattr(tensors, "config", None)
            if origin.config is None and config is not None and hasattr(config, "to_dict"):
                origin = replace(origin, config=config.to_dict())
            tensors = state_of(tensors)
        self._tensors: dict[str, Tensor] = {}
        tied = {}
        first_at: dict[tuple[Any, ...], str] = {}
        for raw_name, tensor in tensors.items():
            name = unwrapped(raw_name)
            if not isinstance(tensor, Tensor):
                raise SourceError(
                    f"{origin.location or 'the weights in memory'} must map names to tensors; {name!r} is a {type(tensor).__name__}"
                )
            storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and tensor.device.type != "meta" and storage in first_at:
                tied[name] = first_at[storage]
            else:
                first_at[storage] = name
                self._tensors[name] = tensor.detach()
        if module is not None:
            self._tensors = under_checkpoint_names(module, self._tensors)
        super().__init__(origin, tied=tied, parallel=True)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    @override
    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise SourceError(f"{name} of {self.label} is on the meta device: it has a shape and no values. Load the weights first.")
        return tensor.cpu()


def hashes_of(source: TensorSource, names: Sequence[str]) -> dict[str, str]:
    """Return the hashes of tensors as they are stored (see ``hash_stored``); several threads read them chunk by chunk."""

    def digest(name: str) -> str:
        meter, load = StoredHash(), source.chunks(name)
        for begin, end in chunk_bounds(math.prod(source.shape(name))):
            meter.update(load(begin, end))
        return meter.digest()

    return dict(zip(names, in_parallel(digest, names, worker_count(None) if source.parallel else 1), strict=True))
