"""From a path, hub id, module or state dict to a source of tensors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.adapters import (
    CONFIG_NAME,
    AdaptedWeights,
    AdapterDifference,
    adapted_model,
    check_same_base,
    holds_adapter,
    named_base,
)
from lata_lightning.store.lora import AdaptedModel, check_unwrapped, peft_kinds
from lata_lightning.store.sources import SafetensorsSource, Source, StateDictSource, holds_vector

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


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


def find_directory(weights: str | Path) -> tuple[Path, str | None]:
    """A local directory, or the snapshot of a hub repository with its commit.

    Raises:
        SourceError: There is neither.
    """
    path = Path(weights)
    if path.is_dir():
        return path, None
    if _HUB_ID.match(str(weights)):
        return _download(str(weights))
    raise SourceError(
        f"{weights} does not exist: expected a Hugging Face directory, a .safetensors or .ckpt file, or a hub id such as 'org/name'"
    )


def shard_files(directory: Path, stem: str) -> list[Path]:
    """The files ``stem.safetensors``, or those its index lists; none if there is neither.

    Raises:
        CorruptFileError: The index is no JSON, or names a file outside the directory.
    """
    index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        listed = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptFileError(f"{index} is no shard index ({error!r})") from error
    foreign = [name for name in listed if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")]
    if foreign:
        raise CorruptFileError(f"{index} may only name safetensors files beside it, it names {foreign[:3]}")
    return [directory / name for name in listed]


def _check_index(directory: Path, source: Source) -> None:
    """Refuse a directory whose shards lack tensors that its index lists, as when they come from two downloads."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        missing = set(json.loads(index.read_text("utf-8"))["weight_map"]) - set(source.names)
        if missing:
            raise CorruptFileError(f"{index} lists tensors that its files do not hold, {first_three(missing)}. Copy the directory again.")


def _open_directory(path: Path, location: str) -> Source:
    if holds_vector(path):
        raise SourceError(f"{path} is a task vector, and a model is needed here")
    files = shard_files(path, "model")
    if not files:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
            raise SourceError(
                f"{path} holds pickled weights only, which can run code when they are loaded. Convert them to safetensors first."
            )
        raise SourceError(f"{path} holds no model.safetensors and no model.safetensors.index.json")
    source = SafetensorsSource(files)
    _check_index(path, source)
    source.location, source.directory = location, path
    config = path / "config.json"
    if config.is_file():
        try:
            source.config = json.loads(config.read_text("utf-8"))
        except ValueError as error:
            raise CorruptFileError(f"{config} is no JSON ({error})") from error
        if not isinstance(source.config, dict):
            raise CorruptFileError(f"{config} must hold a JSON object, it holds a {type(source.config).__name__}")
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
            f"{directory / CONFIG_NAME} names no base_model_name_or_path, so the whole weights cannot be put together. Write the base model's path there."
        )
    if holds_adapter(named):
        raise SourceError(
            f"{directory / CONFIG_NAME} names another adapter as its base, {named}; save what merge_and_unload() gives of that first"
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


def _download(hub_id: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{hub_id} is no local directory and could not be had from the hub ({type(error).__name__}). Check the spelling; offline, give a directory."
        ) from error
    return directory, directory.name
