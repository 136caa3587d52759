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
from lata_lightning.store.checkpoint_names import (
    Piece,
    checkpoint_name_of,
    checkpoint_pieces,
    loading_names,
    row_major,
    under_checkpoint_names,
)
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.names import differing_prefixes, keyed
from lata_lightning.store.sources import TensorSource


@final
class Converted(TensorSource):
    """The tensors of another source, named and split as a checkpoint stores them; a piece that is a part of one tensor is read without the rest.

    Args:
        source: The tensors, under the names of the modules or other names.
        module: The transformers model with those modules; its tensors may be meta tensors.
        pieces: How each tensor of the checkpoint follows from those of the model, by name in the checkpoint.
        origins: Name in ``source`` by name in the model.
        others: Name in ``source`` of the tensors that are not split, by their new name.
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
            # A chunk is valid until the next one of its source is loaded.
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
        bytes_of_origin = self._source.byte_range(self._stored_name(name))
        whole, offset = self._whole(name), self._offset(name)
        if bytes_of_origin is None or whole is not None:
            return bytes_of_origin
        return None if offset is None else (bytes_of_origin, offset, self.shape(name))

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
        """Return the name in the source of a tensor that is not split; None for a piece of a tensor, or of several."""
        if name in self._others:
            return self._others[name]
        return self._stored_name(name) if self._pieces[name].whole else None

    def _offset(self, name: str) -> int | None:
        """Return where a contiguous piece begins in its origin; None for any other piece."""
        if name in self._others:
            return 0
        piece = self._pieces[name]
        return piece.offset if piece.stride == row_major(piece.shape) else None


# Entries to read at a time of a piece that is not contiguous.
_ENTRIES = 1 << 20


class Named(NamedTuple):
    """A source, and the names by which its tensors are compared.

    Attributes:
        source: The tensors.
        names: Name in the source by the name to compare.
        outside: Names in the source of tensors that are not part of the model, as those of other modules of a LightningModule.
    """

    source: TensorSource
    names: Mapping[str, str]
    outside: frozenset[str] = frozenset()


def by_checkpoint_names(side: TensorSource, config: Mapping[str, Any] | None) -> Named | None:
    """Return a source by the names that a checkpoint of the model of a config has.

    Args:
        side: The tensors.
        config: Content of config.json; None if there is none.

    Returns:
        The source, split as a checkpoint is; None where transformers does not know the model, or where the names do not tell how to split.
    """
    module = meta_model(config)
    if module is None:
        return None
    state = module.state_dict()
    every, whole, loaded = checkpoint_pieces(module, state), checkpoint_name_of(module), loading_names(module)
    stored = keyed(side.names, side.label)
    # The names are those of the modules or those of a checkpoint: whichever match more.
    kinds = [_without_prefix(stored, names, side.label) for names in (state, every)]
    matches = [sum(key in names for key in keys) for (keys, _), names in zip(kinds, (state, every), strict=True)]
    by_modules = matches[0] > matches[1]
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
    """Return the stored names by key without the prefix that lets most keys match other names; and the stored names that do not have the prefix."""
    prefix, missing = differing_prefixes(stored, names, label)
    keys = {missing + key.removeprefix(prefix) if key.startswith(prefix) else key: name for key, name in stored.items()}
    return keys, frozenset(name for key, name in stored.items() if not key.startswith(prefix))
