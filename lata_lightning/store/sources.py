"""Named tensors, wherever they lie: Hugging Face directories, safetensors files, Lightning checkpoints, state dicts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import SourceError
from lata_lightning.layers import unwrapped
from lata_lightning.numerics.chunks import ChunkReader, chunk_bounds, factor_chunks, in_parallel, tensor_chunks, worker_count
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.checkpoint_names import state_of, under_checkpoint_names
from lata_lightning.store.hashing import StoredHash, ValueHash, hash_values


class TensorSource(ABC):
    """Tensors by name, each read when it is asked for.

    Attributes:
        location: Where they come from, for messages and provenance; None for tensors in memory.
        revision: Commit of a hub repository.
        directory: The Hugging Face directory they lie in, with its config and tokenizer files.
        config: Content of the directory's config.json.
        tied: Other names of tensors that the source holds once: alias to the name in ``names``.
        parallel: Whether several threads may read at once.
    """

    location: str | None = None
    revision: str | None = None
    directory: Path | None = None
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = {}
    parallel: bool = False

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

    def chunks(self, name: str) -> ChunkReader:
        """The tensor piece by piece; of files, without ever holding all of it."""
        factors = self.low_rank(name)
        return tensor_chunks(self.read(name)) if factors is None else factor_chunks(factors)

    def byte_range(self, name: str) -> Hashable:
        """Where the tensor's bytes lie in files: equal places hold the same bytes. None for anything else."""
        return None

    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        """Of a tensor that is computed as a difference: tuned and start source, and its name there. None for any other."""
        return None

    def measured(self) -> Mapping[tuple[str, str | None], Mapping[str, float | None]]:
        """What reading the tensors has told of the layers, for the record beside them: by name, and label of the vector it is about, a number by layer."""
        return {}

    def origin_name(self, name: str) -> str:
        """Name of a tensor where it comes from, beneath all views of it."""
        return name

    def by_tensor(self) -> Mapping[str, Mapping[str, Any]]:
        """The same by tensor, and for all vectors together."""
        return {}

    @property
    def label(self) -> str:
        """Short name for messages."""
        return self.location or "the weights in memory"


class StateDictSource(TensorSource):
    """Tensors in memory: a module, a state dict, or the state dict of a checkpoint file.

    Args:
        tensors: A module, or tensors by name.
        location: Where they come from.
        config: Content of the config.json that belongs to them; that of a module is its own.
    """

    parallel = True

    def __init__(
        self, tensors: nn.Module | Mapping[str, Tensor], location: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config
        module = tensors if isinstance(tensors, nn.Module) else None
        if isinstance(tensors, nn.Module):
            config = getattr(tensors, "config", None)
            self.config = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
            tensors = state_of(tensors)
        self.location = location
        self._tensors: dict[str, Tensor] = {}
        tied = {}
        first_at: dict[tuple[Any, ...], str] = {}
        for raw_name, tensor in tensors.items():
            name = unwrapped(raw_name)
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


def hashes_of(source: TensorSource, names: Sequence[str]) -> dict[str, str]:
    """Hashes of tensors as they are stored (see ``hash_stored``), read piece by piece by several threads."""

    def digest(name: str) -> str:
        meter, load = StoredHash(), source.chunks(name)
        for begin, end in chunk_bounds(math.prod(source.shape(name))):
            meter.update(load(begin, end))
        return meter.digest()

    return dict(zip(names, in_parallel(digest, names, worker_count(None) if source.parallel else 1), strict=True))


class View(TensorSource):
    """Some tensors of another source, under other names."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.source, self._name_of = source, dict(names)
        self.location, self.revision, self.directory, self.config = (
            source.location,
            source.revision,
            source.directory,
            source.config,
        )
        self.parallel = source.parallel

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

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        return self.source.chunks(self._name_of[name])

    def byte_range(self, name: str) -> Hashable:  # noqa: D102
        return self.source.byte_range(self._name_of[name])

    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:  # noqa: D102
        return self.source.sides(self._name_of[name])

    def origin_name(self, name: str) -> str:  # noqa: D102
        return self.source.origin_name(self._name_of[name])

    def stored_name(self, name: str) -> str:
        """Name of a tensor in the source that this is a view of."""
        return self._name_of[name]


class Fingerprinted(View):
    """A source that notes the hash of every tensor as it is read, so that its identity costs no pass of its own."""

    def __init__(self, source: TensorSource) -> None:
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

    def chunks(self, name: str) -> ChunkReader:  # noqa: D102
        load = super().chunks(name)
        meter, count = ValueHash(), math.prod(self.shape(name))
        if count == 0:
            self.hashes[name] = meter.digest()
        if name in self.hashes:
            return load

        done = 0

        def piece(begin: int, end: int) -> Tensor:
            nonlocal done
            part = load(begin, end)
            if begin == done:
                # A part that is read by itself says nothing about the identity of the whole.
                meter.update(part)
                done = end
                if end == count:
                    self.hashes[name] = meter.digest()
            return part

        return piece
