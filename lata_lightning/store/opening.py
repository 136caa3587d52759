"""From a path, hub id, module or state dict to a source of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lata_lightning.errors import SourceError
from lata_lightning.store.adapter_files import adapted_model, named_base
from lata_lightning.store.adapters import AdaptedWeights, AdapterDifference, adapter_in, check_same_base
from lata_lightning.store.checkpoint_content import UnknownModelError, part_of
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.directories import ADAPTER_CONFIG, adapter_directory, find_weights
from lata_lightning.store.foreign_adapters import check_no_factors
from lata_lightning.store.formats.table import find_format
from lata_lightning.store.lora import AdaptedModel, check_unwrapped, peft_kinds
from lata_lightning.store.names import differing_prefixes, keyed
from lata_lightning.store.sources import Origin, StateDictSource, TensorSource
from lata_lightning.store.views import View

Weights: TypeAlias = str | Path | nn.Module | Mapping[str, Tensor] | TensorSource
"""What weights can be given as."""


def open_source(weights: Weights, model: str | None = None) -> TensorSource:
    """Return the source of some weights.

    Args:
        weights: A model directory, a safetensors file, a file of ``torch.save`` (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), a sharded checkpoint
            directory, a hub id, a module or a state dict; or a peft adapter directory, which is read as the weights it names as its base plus the
            adapter. Files are recognised by their content.
        model: Name of the module to take, where there are several, such as actor and reference, or a model and its running average; its tensors
            get the names they have in the module. For a checkpoint it may also be the key of a state dict.

    Raises:
        UnknownModelError: There is no module of that name.
        SourceError: The path is none of these, or cannot be read.
        CorruptFileError: A file is truncated or its index does not match.
    """
    if isinstance(weights, TensorSource):
        return weights if model is None else View(weights, part_of({name: name for name in weights.names}, model, weights.label))
    if isinstance(weights, peft_kinds()):
        raise SourceError(
            "a model wrapped by peft is its base weights plus its adapters: give it as TUNED, or the directory of its base as START"
        )
    if isinstance(weights, nn.Module):
        check_unwrapped(weights)
    if isinstance(weights, nn.Module | Mapping):
        if model is not None:
            return open_source(StateDictSource(weights), model)
        in_memory = StateDictSource(weights)
        check_no_factors(in_memory.names, in_memory.label, in_memory.config)
        return in_memory
    path, revision = find_weights(weights)
    adapter = adapter_directory(path)
    if adapter is not None and model is not None:
        raise UnknownModelError(f"{weights} is an adapter, which holds no model named {model!r}. Leave --model out for it.")
    if adapter is not None:
        return _open_adapted(adapter, Origin(str(weights), revision))
    source = find_format(path).open(path, Origin(str(weights), revision), model)
    check_no_factors(source.names, source.label, source.config)
    return source


def narrowed(weights: Sequence[Weights], model: str | None) -> list[Weights]:
    """Return several weights, each narrowed to its module of a name where it has one; the others as they are.

    Where a checkpoint file has that module, model directories and models in memory stay as they are.

    Args:
        weights: As for ``open_source``.
        model: Name of the module; None to leave all as they are.

    Raises:
        UnknownModelError: None of them has that module.
    """
    if model is None:
        return list(weights)
    opened: list[TensorSource | None] = []
    errors: list[UnknownModelError] = []
    for one in weights:
        try:
            opened.append(open_source(one, model))
        except UnknownModelError as error:
            errors.append(error)
            opened.append(None)
    if len(errors) == len(weights):
        raise errors[-1]
    # Whole models may have a module of the name that a checkpoint has for all of a model: transformers calls most trunks "model".
    in_file = [source is not None and source.location is not None and source.directory is None for source in opened]
    return [
        one if source is None or (any(in_file) and not checkpoint) else source
        for one, source, checkpoint in zip(weights, opened, in_file, strict=True)
    ]


def open_difference(weights: object, start: TensorSource) -> AdapterDifference | None:
    """Return what a peft adapter adds to the weights it was trained on; None for weights that are no adapter.

    An adapter is a directory, a hub id of one, or a model wrapped by peft.

    Args:
        weights: As for ``open_source``.
        start: The weights the adapter was trained on, alone or plus another adapter.

    Raises:
        BaseMismatchError: The weights that the adapter names as its base can be read, and differ from the start.
        SourceError, CorruptFileError, LayoutMismatchError: The adapter cannot be read as factors over ``start``.
    """
    if isinstance(weights, peft_kinds()):
        model = AdaptedModel(weights)
        return AdapterDifference(_named_for(start, model), model, before=adapter_in(start))
    if not isinstance(weights, str | Path):
        return None
    path, revision = find_weights(weights)
    directory = adapter_directory(path)
    if directory is None:
        return None
    before = adapter_in(start)
    if before is not None and not _same_place(named_base(directory), before.start):
        before = None
    if before is None:
        _check_base(start, directory, str(weights))
    model = adapted_model(start, directory)
    return AdapterDifference(_named_for(start, model), model, Origin(str(weights), revision), before)


def _open_adapted(directory: Path, origin: Origin) -> TensorSource:
    named = named_base(directory)
    if named is None:
        raise SourceError(
            f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path, so there are no whole weights. Write the base model's path there."
        )
    if adapter_directory(named) is not None:
        raise SourceError(
            f"{directory / ADAPTER_CONFIG} names another adapter as its base, {named}; save what merge_and_unload() gives of that first"
        )
    start = open_source(named)
    model = adapted_model(start, directory)
    start = _named_for(start, model)
    return AdaptedWeights(start, AdapterDifference(start, model, origin))


def _named_for(start: TensorSource, adapted: AdaptedModel) -> TensorSource:
    """Return the start under the names of the adapted model, which may have a head, and so a prefix, that the start lacks."""
    wanted = under_checkpoint_names(adapted.module, adapted.plain).keys()
    if adapter_in(start) is not None or wanted <= set(start.names):
        return start
    stored = keyed(start.names, start.label)
    prefix, missing = differing_prefixes(stored, wanted, start.label)
    if not prefix and not missing:
        return start
    return View(start, {missing + key.removeprefix(prefix) if key.startswith(prefix) else key: name for key, name in stored.items()})


def _same_place(one: str | None, other: TensorSource) -> bool:
    """Return whether weights come from a path or hub id."""
    if one is None or one == other.location:
        return one is not None
    return other.directory is not None and Path(one).is_dir() and Path(one).samefile(other.directory)


def _check_base(start: TensorSource, directory: Path, location: str) -> None:
    """Refuse a start with other weights than those that the adapter names, if these can be read here."""
    named = named_base(directory)
    if named is None or start.location is None or _same_place(named, start):
        return
    if Path(named).is_dir():
        check_same_base(start, open_source(named), location)
