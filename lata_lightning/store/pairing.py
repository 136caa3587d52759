"""Bringing two sources under one set of names, or saying why that cannot be."""

from __future__ import annotations

import re
from collections.abc import Container

import torch

from lata_lightning.errors import LayoutMismatchError, SourceError, first_three
from lata_lightning.layers import skeleton
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.sources import DTYPES, Source, StateDictSource, View


def pair(start: Source, tuned: Source) -> tuple[Source, Source]:
    """Two sources under one set of names: those of the start.

    The module prefix of a Lightning checkpoint is taken off, further modules of the LightningModule are left out, a tied tensor that one side
    stores once and the other twice counts once, and buffers that only old releases of transformers saved are left out.

    Raises:
        LayoutMismatchError: Names or shapes differ otherwise.
    """
    start, tuned = pair_names(start, tuned)
    odd = [name for name in start.names if start.shape(name) != tuned.shape(name)]
    if odd:
        raise LayoutMismatchError(_shape_message(start, tuned, odd))
    return start, tuned


def pair_names(start: Source, tuned: Source) -> tuple[Source, Source]:
    """As ``pair``, but the tensors may differ in shape.

    Raises:
        LayoutMismatchError: Names differ otherwise.
        SourceError: A tensor is of a dtype that cannot be read.
    """
    tuned = named_like(tuned, start)
    start = named_like(start, tuned)
    start_only, tuned_only = set(start.names) - set(tuned.names), set(tuned.names) - set(start.names)
    lone = {name for name in start_only if not _is_derived(start, name) and not _stored_twice(start, name, tuned)}
    lone |= {name for name in tuned_only if not _is_derived(tuned, name) and not _stored_twice(tuned, name, start)}
    if lone:
        raise LayoutMismatchError(
            f"{start.label} and {tuned.label} must hold the same tensors; on one side only are {first_three(lone)}. Are both of one architecture?"
        )
    common = [name for name in start.names if name not in start_only]
    kinds = [(name, side.dtype(name)) for name in common for side in (start, tuned)]
    unusable = {name for name, dtype in kinds if dtype not in DTYPES.values()}
    if unusable:
        raise SourceError(
            f"{start.label} and {tuned.label} must hold plain floating or integer tensors; other dtypes have {first_three(unusable)}. Convert them first."
        )
    mixed = [name for name in common if start.dtype(name).is_floating_point != tuned.dtype(name).is_floating_point]
    if mixed:
        raise LayoutMismatchError(
            f"{start.label} and {tuned.label} must both hold weights as floating numbers; integers on one side only are {first_three(mixed)}. "
            "Is one of them quantised?"
        )
    names = {name: name for name in common}
    return View(start, names), View(tuned, names)


def _shape_message(start: Source, tuned: Source, odd: list[str]) -> str:
    name = odd[0]
    one, other = start.shape(name), tuned.shape(name)
    if len(one) == len(other) == 2 and one[1:] == other[1:] and re.search("embed|wte|shared|head", name):
        return (
            f"{start.label} and {tuned.label} must have the same vocabulary; {name} has {one[0]} rows in one and {other[0]} in the other. "
            "Resize the token embeddings of one of them first, or say whose rows to keep (--vocabulary of lata extract, merge and forget)."
        )
    return f"{start.label} and {tuned.label} must have the same shapes; different are {first_three(odd)}, {name} with {one} and {other}"


def named_like(source: Source, reference: Source) -> Source:
    """A source that lies in no model directory under the names of a reference.

    The module prefix of a Lightning checkpoint is taken off, each tied tensor gets the name the reference has for it, and where the reference
    says by its config which architecture it is, tensors are named as that architecture is saved.
    """
    if source.directory is not None:
        return source
    wanted = set(reference.names)
    prefix = "" if set(source.names) & wanted else _module_prefix(source, wanted)
    names = {name[len(prefix) :]: name for name in source.names if name.startswith(prefix)}
    for alias, held in source.tied.items():
        if alias.startswith(prefix) and alias[len(prefix) :] in wanted and held[len(prefix) :] not in wanted:
            names.pop(held[len(prefix) :], None)
            names[alias[len(prefix) :]] = held
    if wanted - set(names) and reference.config is not None and source.config is None:
        module = skeleton(reference.config)
        if module is not None:
            saved = under_checkpoint_names(module, {name: source.read(held) for name, held in names.items()})
            if len(wanted & set(saved)) > len(wanted & set(names)):
                renamed = StateDictSource(saved, source.location)
                return View(renamed, {name: name for name in renamed.names})
    return View(source, names)


def _module_prefix(source: Source, wanted: Container[str]) -> str:
    """The path under which most of the wanted names are found, with its dot; empty if there is none."""
    found: dict[str, int] = {}
    for name in source.names:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefix = ".".join(parts[:cut]) + "."
                found[prefix] = found.get(prefix, 0) + 1
    most = [prefix for prefix in found if found[prefix] == max(found.values())]
    if len(most) > 1:
        raise LayoutMismatchError(
            f"{source.label} must hold the model once; as many of its tensors are found under each of {first_three(most)}. "
            "Give the state dict of the one that is meant."
        )
    return most[0] if most else ""


def _is_derived(source: Source, name: str) -> bool:
    """Whether a tensor is no weight but a table that transformers computes by itself, and saved with the weights in old releases."""
    if name.endswith(("rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "attention.masked_bias")):
        return True
    # The causal mask of GPT-2 and GPT-NeoX.
    return name.endswith(("attn.bias", "attention.bias")) and len(source.shape(name)) == 4


def _stored_twice(source: Source, name: str, other: Source) -> bool:
    """Whether a tensor that only this source lists is a copy of one that both have: tied weights, stored under two names."""
    if not any((side.config or {}).get("tie_word_embeddings", False) for side in (source, other)):
        return False
    twins = (twin for twin in other.names if twin in source.names and source.shape(twin) == source.shape(name))
    return any(torch.equal(source.read(twin), source.read(name)) for twin in twins)


def check_same_tensors(one: Source, other: Source) -> None:
    """Refuse the tensors of two vectors that differ in names or shapes; the message names the first three tensors."""
    lone = set(one.names) ^ set(other.names)
    if lone:
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must hold the same tensors; on one side only are {first_three(lone)}. Were both made from one base model?"
        )
    odd = {name for name in one.names if one.shape(name) != other.shape(name)}
    if odd:
        name = min(odd)
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must have the same shapes; different are {first_three(odd)}, {name} with {one.shape(name)} and "
            f"{other.shape(name)}. Do both have the same vocabulary and sizes?"
        )
