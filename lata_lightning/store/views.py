"""Sources made of other sources: under other names, chosen, scaled, hashed while they are read, or zero."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.numerics.chunks import ChunkReader, zeros
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.hashing import ValueHash, hash_values
from lata_lightning.store.sources import Origin, TensorSource


class Forwarding(TensorSource):
    """Tensors that other sources have: every method asks the source of the tensor."""

    @abstractmethod
    def target(self, name: str) -> tuple[TensorSource, str]:
        """Return the source of a tensor, and its name there."""

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        source, stored = self.target(name)
        return source.shape(stored)

    @override
    def dtype(self, name: str) -> torch.dtype:
        source, stored = self.target(name)
        return source.dtype(stored)

    @override
    def read(self, name: str) -> Tensor:
        source, stored = self.target(name)
        return source.read(stored)

    @override
    def chunks(self, name: str) -> ChunkReader:
        source, stored = self.target(name)
        return source.chunks(stored)

    @override
    def low_rank(self, name: str) -> LowRank | None:
        source, stored = self.target(name)
        return source.low_rank(stored)

    @override
    def byte_range(self, name: str) -> Hashable:
        source, stored = self.target(name)
        return source.byte_range(stored)

    @override
    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        source, stored = self.target(name)
        return source.sides(stored)

    @override
    def origin_name(self, name: str) -> str:
        source, stored = self.target(name)
        return source.origin_name(stored)


@final
class View(Forwarding):
    """Some tensors of another source, under other names.

    Args:
        source: The source that the tensors are read from.
        names: Name in the source by the name in the view.

    Attributes:
        source: The source that the tensors are read from.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        super().__init__(source.origin, parallel=source.parallel)
        self.source, self._name_of = source, dict(names)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._name_of)

    @override
    def target(self, name: str) -> tuple[TensorSource, str]:
        return self.source, self._name_of[name]

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in the source that this is a view of."""
        return self._name_of[name]


@final
class Chosen(Forwarding):
    """Tensors of several sources, each read from the source that is chosen for its name.

    Args:
        source_of: The source of each tensor, which knows it by the same name.
        location: What they are together, for messages.
    """

    def __init__(self, source_of: Mapping[str, TensorSource], location: str) -> None:
        super().__init__(Origin(location), parallel=all(source.parallel for source in source_of.values()))
        self._source_of = dict(source_of)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._source_of)

    @override
    def target(self, name: str) -> tuple[TensorSource, str]:
        return self._source_of[name], name

    @override
    def origin_name(self, name: str) -> str:
        return name


class Wrapping(Forwarding):
    """The tensors of another source, some of which a subclass reads in another way.

    Args:
        source: The source that the tensors are read from.
        origin: Where the tensors come from; None for the origin of the source.
    """

    def __init__(self, source: TensorSource, origin: Origin | None = None) -> None:
        super().__init__(origin or source.origin, parallel=source.parallel)
        self._source = source

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @override
    def target(self, name: str) -> tuple[TensorSource, str]:
        return self._source, name


@final
class Fingerprinted(Wrapping):
    """A source that notes the hash of every tensor when it is read whole, so that its identity costs no pass of its own.

    Attributes:
        hashes: Hash of the values by name, of the tensors that were read.
    """

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.hashes: dict[str, str] = {}

    @override
    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if name not in self.hashes:
            self.hashes[name] = hash_values(tensor)
        return tensor

    @override
    def chunks(self, name: str) -> ChunkReader:
        load = super().chunks(name)
        meter, count = ValueHash(), math.prod(self.shape(name))
        if count == 0:
            self.hashes[name] = meter.digest()
        if name in self.hashes:
            return load

        done = 0

        def read_range(begin: int, end: int) -> Tensor:
            nonlocal done
            part = load(begin, end)
            # The hash is that of the whole tensor, so only ranges that follow one another from the start on count.
            if begin == done:
                meter.update(part)
                done = end
                if end == count:
                    self.hashes[name] = meter.digest()
            return part

        return read_range


class Computed(TensorSource):
    """Tensors computed from those of another source, with its names and shapes.

    Args:
        like: The source whose names and shapes they have.
        origin: Where they come from.
        dtype: Their dtype; None for that of the other source.
        parallel: Whether several threads may read at once.
    """

    def __init__(self, like: TensorSource, origin: Origin, *, dtype: torch.dtype | None = None, parallel: bool = False) -> None:
        super().__init__(origin, parallel=parallel)
        self._like, self._dtype = like, dtype

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._like.names

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._like.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._like.dtype(name)


@final
class Scaled(Computed):
    """The tensors of a source, each times a factor of its own.

    Args:
        source: The tensors.
        factor_of: Returns the factor of a tensor.
        location: What they are, for messages.
    """

    def __init__(self, source: TensorSource, factor_of: Callable[[str], float], location: str) -> None:
        super().__init__(source, Origin(location), parallel=source.parallel)
        self._factor_of = factor_of

    @override
    def read(self, name: str) -> Tensor:
        return self._like.read(name) * self._factor_of(name)

    @override
    def chunks(self, name: str) -> ChunkReader:
        if self.low_rank(name) is not None:
            return super().chunks(name)
        load, factor = self._like.chunks(name), self._factor_of(name)
        return lambda begin, end: load(begin, end) * factor

    @override
    def low_rank(self, name: str) -> LowRank | None:
        factors = self._like.low_rank(name)
        return None if factors is None else factors.scaled(self._factor_of(name))


@final
class Zeros(Computed):
    """Zeros in float32, with the names and shapes of another source."""

    def __init__(self, like: TensorSource) -> None:
        super().__init__(like, like.origin, dtype=torch.float32, parallel=True)

    @override
    def read(self, name: str) -> Tensor:
        return torch.zeros(self.shape(name))

    @override
    def chunks(self, name: str) -> ChunkReader:
        return zeros(torch.float32)
