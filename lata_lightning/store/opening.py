"""From a path, hub id, module or state dict to a source of tensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.adapters import AdaptedWeights, AdapterDifference, adapted_model, check_same_base, named_base
from lata_lightning.store.directories import ADAPTER_CONFIG, check_index, find_directory, holds_adapter, model_config, weight_files
from lata_lightning.store.lora import AdaptedModel, check_unwrapped, peft_kinds
from lata_lightning.store.sources import SafetensorsSource, Source, StateDictSource


def open_source(weights: str | Path | nn.Module | Mapping[str, Tensor] | Source) -> Source:
    """Weights to read from.

    Args:
        weights: A Hugging Face directory (one file or sharded), a ``.safetensors`` file, a Lightning ``.ckpt``, a hub id, a module or a state
            dict, or a peft adapter directory, which stands for the weights it names as its base plus what it adds.

    Raises:
        SourceError: The path is nothing of that kind, or would have to be unpickled.
        CorruptFileError: A file is truncated or its index does not match.
    """
    if isinstance(weights, Source):
        return weights
    if isinstance(weights, peft_kinds()):
        raise SourceError(
            "a model wrapped by peft stands for its base weights plus its adapters: give it as TUNED, or the directory of its base as START"
        )
    if isinstance(weights, nn.Module):
        check_unwrapped(weights)
    if isinstance(weights, nn.Module | Mapping):
        return StateDictSource(weights)
    path = Path(weights)
    if path.is_file():
        return _open_file(path)
    directory, revision = find_directory(weights)
    source = _open_adapted(directory, str(weights)) if holds_adapter(directory) else _open_directory(directory, str(weights))
    source.revision = revision
    return source


def open_difference(weights: object, start: Source) -> AdapterDifference | None:
    """What a peft adapter adds to the weights it was trained on; None for weights that stand for themselves.

    An adapter is a directory, a hub id of one, or a model wrapped by peft.

    Args:
        weights: As for ``open_source``.
        start: The weights the adapter was trained on, or what those and another adapter make.

    Raises:
        BaseMismatchError: The adapter names other weights as its base, and they can be read and differ.
        SourceError, CorruptFileError, LayoutMismatchError: The adapter cannot be read as factors over ``start``.
    """
    if isinstance(weights, peft_kinds()):
        return AdapterDifference(start, AdaptedModel(weights), None, start.added if isinstance(start, AdaptedWeights) else None)
    if not isinstance(weights, str | Path) or Path(weights).is_file():
        return None
    directory, revision = find_directory(weights)
    if not holds_adapter(directory):
        return None
    before = start.added if isinstance(start, AdaptedWeights) and _same_place(named_base(directory), start.base) else None
    if before is None:
        _check_base(start, directory, str(weights))
    added = AdapterDifference(start, adapted_model(start, directory), str(weights), before)
    added.revision = revision
    return added


def _open_directory(path: Path, location: str) -> Source:
    source = SafetensorsSource(weight_files(path))
    check_index(path, set(source.names))
    source.location, source.directory, source.config = location, path, model_config(path)
    return source


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        source = SafetensorsSource([path])
        source.location = str(path)
        return source
    if path.suffix != ".ckpt":
        raise SourceError(
            f"{path} cannot be read: expected .safetensors or a Lightning .ckpt; other formats may run code when they are loaded"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path} holds objects that would have to be unpickled, which can run code; save it with plain tensors and primitives only "
            "(in Lightning: save_hyperparameters() with plain values)"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        # The last three are what a damaged pickle makes of the reader.
        raise CorruptFileError(f"{path} is no readable checkpoint ({str(error).partition(chr(10))[0]}). Is it complete?") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise SourceError(f"{path} is no Lightning checkpoint: it has no 'state_dict'")
    wrapped = [name for name in checkpoint["state_dict"] if ".lora_A." in name or ".lora_embedding_A." in name]
    if wrapped:
        raise SourceError(
            f"{path} is the checkpoint of a model wrapped by peft, {first_three(wrapped)}, and does not hold the scaling of its adapters. Save the "
            "adapter with save_pretrained and give that directory."
        )
    return StateDictSource(checkpoint["state_dict"], str(path))


def _open_adapted(directory: Path, location: str) -> Source:
    named = named_base(directory)
    if named is None:
        raise SourceError(
            f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path, so there are no whole weights. Write the base model's path there."
        )
    if holds_adapter(named):
        raise SourceError(
            f"{directory / ADAPTER_CONFIG} names another adapter as its base, {named}; save what merge_and_unload() gives of that first"
        )
    start = open_source(named)
    return AdaptedWeights(start, AdapterDifference(start, adapted_model(start, directory), location))


def _same_place(one: str | None, other: Source) -> bool:
    """Whether a path or hub id is where weights come from."""
    if one is None or one == other.location:
        return one is not None
    return other.directory is not None and Path(one).is_dir() and Path(one).samefile(other.directory)


def _check_base(start: Source, directory: Path, location: str) -> None:
    """Refuse a start with other weights than those the adapter names, if these are at hand."""
    named = named_base(directory)
    if named is None or start.location is None or _same_place(named, start):
        return
    if Path(named).is_dir():
        check_same_base(start, open_source(named), location)
