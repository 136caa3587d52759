"""Weights under the names of a model's modules, read under the names and in the pieces of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.numerics.chunks import ChunkReader, tensor_chunks
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.checkpoint_names import Piece, checkpoint_name_of, chunk_bounds, loading_names, row_major, under_checkpoint_names
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.names import differing_prefixes, keyed
from lata_lightning.store.sources import TensorSource


@final
class Converted(TensorSource):
    """The tensors of another source as a checkpoint stores them; each piece is read by itself where it is a part of one tensor.

    Args:
        source: Holds tensors under the names of the modules, or under others.
        module: The transformers model whose names those are; its tensors may be empty.
        pieces: What to make of the tensors of the model, by name in the checkpoint.
        origins: Name in ``source`` by name in the model.
        others: Name in ``source`` of further tensors, which stay as they are, by the name to give them.
    """

    def __init__(
        self, source: TensorSource, module: nn.Module, pieces: Mapping[str, Piece], origins: Mapping[str, str], others: Mapping[str, str]
    ) -> None:
        super().__init__(source.origin, parallel=source.parallel)
        self._source, self._module, self._pieces, self._origins, self._others = source, module, pieces, dict(origins), dict(others)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (*self._pieces, *self._others)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        whole = self._whole(name)
        return self._pieces[name].shape if whole is None else self._source.shape(whole)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._stored_name(name))

    @override
    def read(self, name: str) -> Tensor:
        whole = self._whole(name)
        if whole is not None:
            return self._source.read(whole)
        piece = self._pieces[name]
        if piece.stride is None or piece.offset is None:
            return under_checkpoint_names(self._module, {origin: self._source.read(self._origins[origin]) for origin in piece.origins})[
                name
            ]
        count = 1 + sum(stride * (length - 1) for stride, length in zip(piece.stride, piece.shape, strict=True))
        if math.prod(piece.shape) == 0:
            return torch.empty(piece.shape, dtype=self.dtype(name))
        load, entries = self._source.chunks(self._stored_name(name)), torch.empty(count, dtype=self.dtype(name))
        for begin in range(0, count, _ENTRIES):
            end = min(begin + _ENTRIES, count)
            # What a source loads is valid until the next piece of it is.
            entries[begin:end] = load(piece.offset + begin, piece.offset + end)
        return entries.as_strided(piece.shape, piece.stride).contiguous()

    @override
    def low_rank(self, name: str) -> LowRank | None:
        whole = self._whole(name)
        return None if whole is None else self._source.low_rank(whole)

    @override
    def chunks(self, name: str) -> ChunkReader:
        whole, offset = self._whole(name), self._offset(name)
        if whole is not None:
            return self._source.chunks(whole)
        if offset is None:
            return tensor_chunks(self.read(name))
        load = self._source.chunks(self._stored_name(name))
        return lambda begin, end: load(offset + begin, offset + end)

    @override
    def byte_range(self, name: str) -> Hashable:
        place = self._source.byte_range(self._stored_name(name))
        whole, offset = self._whole(name), self._offset(name)
        if place is None or whole is not None:
            return place
        return None if offset is None else (place, offset, self.shape(name))

    @override
    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        whole = self._whole(name)
        return None if whole is None else self._source.sides(whole)

    @override
    def origin_name(self, name: str) -> str:
        return self._source.origin_name(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        return self._others[name] if name in self._others else self._origins[self._pieces[name].origins[0]]

    def _whole(self, name: str) -> str | None:
        """The stored tensor that a name stands for as it is; None for a part of one, or what is computed."""
        if name in self._others:
            return self._others[name]
        return self._stored_name(name) if self._pieces[name].whole else None

    def _offset(self, name: str) -> int | None:
        """Where a piece begins that lies in one go in its origin; None for any other."""
        if name in self._others:
            return 0
        piece = self._pieces[name]
        return piece.offset if piece.stride == row_major(piece.shape) else None


# Entries to read at a time of a piece that lies scattered.
_ENTRIES = 1 << 20


class Named(NamedTuple):
    """A source, and what its tensors are compared by.

    Attributes:
        source: The tensors.
        names: Name in the source by the key to compare by.
        outside: Names in the source of tensors that lie beside the model, as other modules of a LightningModule do.
    """

    source: TensorSource
    names: Mapping[str, str]
    outside: frozenset[str] = frozenset()


def by_checkpoint_names(side: TensorSource, config: Mapping[str, Any] | None) -> Named | None:
    """A source by the names of a checkpoint of the model that a config describes.

    Args:
        side: The tensors.
        config: Content of config.json; None if nobody says which model it is.

    Returns:
        The source, in the pieces a checkpoint has; None where the model is not known, or names are no help.
    """
    module = meta_model(config)
    if module is None:
        return None
    state = module.state_dict()
    every, whole, loaded = chunk_bounds(module, state), checkpoint_name_of(module), loading_names(module)
    stored = keyed(side.names, side.label)
    # Whichever explains more of the names: those of the modules, or those of a checkpoint.
    kinds = [_without_prefix(stored, names, side.label) for names in (state, every)]
    found = [sum(key in names for key in keys) for (keys, _), names in zip(kinds, (state, every), strict=True)]
    by_modules = found[0] > found[1]
    keys, outside = kinds[0] if by_modules else kinds[1]
    others: dict[str, str] = {}
    origins: dict[str, str] = {}
    for key, name in keys.items():
        loads = loaded(key)
        inside = key if by_modules and key in state else loads
        if inside in state and inside not in whole:
            origins[inside] = name
        elif key in every and not by_modules:
            others[key] = name
        else:
            others[whole.get(inside, key)] = name
    split = {
        name: piece
        for name, piece in every.items()
        if not piece.whole
        and origins.keys() >= set(piece.origins)
        and all(side.shape(origins[origin]) == tuple(state[origin].shape) for origin in piece.origins)
    }
    used = {origin for piece in split.values() for origin in piece.origins}
    others |= {name: name for origin, name in origins.items() if origin not in used}
    if len(others) + len(used) != len(stored) or others.keys() & split.keys():
        return None
    if not split:
        return Named(side, others, outside)
    made = Converted(side, module, split, origins, others)
    return Named(made, {name: name for name in made.names}, frozenset(name for name, stored in others.items() if stored in outside))


def _without_prefix(stored: Mapping[str, str], names: Mapping[str, object], label: str) -> tuple[dict[str, str], frozenset[str]]:
    """Stored names by key, with the prefix that brings most of them to some names; and those that do not have the prefix."""
    prefix, missing = differing_prefixes(stored, names, label)
    keys = {missing + key.removeprefix(prefix) if key.startswith(prefix) else key: name for key, name in stored.items()}
    return keys, frozenset(name for key, name in stored.items() if not key.startswith(prefix))
