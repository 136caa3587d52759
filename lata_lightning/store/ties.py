"""Tied tensors, which are one tensor in the model and may be stored under several names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

import torch
from torch import nn

from lata_lightning.numerics.chunks import chunk_bounds
from lata_lightning.store.checkpoint_names import checkpoint_name_of, tied_groups
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.sources import TensorSource


class Ties:
    """Which tensors of a model are tied, by its config or its class.

    Args:
        sides: Both sides of a pairing: the config of either says which model it is.
    """

    def __init__(self, sides: Iterable[TensorSource]) -> None:
        configs = [source.config for source in sides if source.config is not None]
        self._groups: list[set[str]] = []
        # Where transformers cannot build the model, its config alone says that it is tied.
        self._stated = False
        for config in configs:
            module = meta_model(config)
            if module is None:
                self._stated = self._stated or bool(config.get("tie_word_embeddings", False))
                continue
            base, saved = _base_prefix(module), checkpoint_name_of(module)
            for group in tied_groups(module):
                names = set(group) | {saved[name] for name in group if name in saved}
                self._groups.append(names | {name.removeprefix(base) for name in names} | {base + name for name in names})

    def __call__(self, one: str, other: str) -> bool:
        """Return whether two names are one tensor."""
        if self._stated and _HEADS.search(one) and _HEADS.search(other):
            return True
        return any(one in group and other in group for group in self._groups)


# Names of embeddings and of the heads that share their weights.
_HEADS = re.compile(r"embed|wte|shared|word_embeddings|lm_head|predictions|output|decoder\.(weight|bias)$")


def _base_prefix(module: nn.Module) -> str:
    prefix = str(getattr(module, "base_model_prefix", "") or "")
    return f"{prefix}." if prefix else ""


def equal_tensors(source: TensorSource, one: str, other: str) -> bool:
    """Return whether two tensors of a source have the same values; they are read chunk by chunk."""
    if source.shape(one) != source.shape(other):
        return False
    if source.byte_range(one) is not None and source.byte_range(one) == source.byte_range(other):
        return True
    first, second = source.chunks(one), source.chunks(other)
    # A chunk may be overwritten by the next one of its source.
    return all(torch.equal(first(begin, end).clone(), second(begin, end)) for begin, end in chunk_bounds(prod(source.shape(one))))
