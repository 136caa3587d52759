"""Named tensors, wherever they lie: Hugging Face directories, safetensors files, Lightning checkpoints, state dicts."""

from __future__ import annotations

import json
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LayoutMismatchError, SourceError, first_three
from lata_lightning.store.hashing import hash_values

MANIFEST_NAME = "task_vector.json"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source(ABC):
    """Tensors by name, each read when it is asked for.

    Attributes:
        location: Where they come from, for messages and provenance; None for tensors in memory.
        revision: Commit of a hub repository.
        directory: The Hugging Face directory they lie in, with its config and tokenizer files.
        config: Content of the directory's config.json.
        tied: Other names of tensors that the source holds once: alias to the name in ``names``.
    """

    location: str | None = None
    revision: str | None = None
    directory: Path | None = None
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = {}

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

    @property
    def label(self) -> str:
        """Short name for messages."""
        return self.location or "the weights in memory"


class SafetensorsSource(Source):
    """One or several safetensors files; memory-mapped, so that only what is read is loaded."""

    def __init__(self, files: list[Path]) -> None:
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in files:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    entry = handle.get_slice(name)
                    self._layout[name] = (tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
                    self._file_of[name] = handle
            except FileNotFoundError as error:
                raise CorruptFileError(f"{path} is missing, though its index names it. Copy the directory again.") from error
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(
                    f"{path} is no readable safetensors file ({error}). Is it complete? Copy or download it again."
                ) from error
            except KeyError as error:
                raise SourceError(f"{path} holds tensors of dtype {error}, which are not supported") from error

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._layout)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._layout[name][0]

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._layout[name][1]

    def read(self, name: str) -> Tensor:  # noqa: D102
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


class StateDictSource(Source):
    """Tensors in memory: a module, a state dict, or the state dict of a checkpoint file."""

    def __init__(self, tensors: nn.Module | Mapping[str, Tensor], location: str | None = None) -> None:
        if isinstance(tensors, nn.Module):
            config = getattr(tensors, "config", None)
            self.config = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
            tensors = tensors.state_dict()
        self.location = location
        self._tensors: dict[str, Tensor] = {}
        tied = {}
        first_at: dict[tuple[Any, ...], str] = {}
        for raw_name, tensor in tensors.items():
            # Compiled submodules carry a marker in their names that no checkpoint on disk has.
            name = raw_name.replace("_orig_mod.", "")
            if not isinstance(tensor, Tensor):
                raise SourceError(f"{self.label} must map names to tensors; {name!r} is a {type(tensor).__name__}")
            storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and tensor.device.type != "meta" and storage in first_at:
                tied[name] = first_at[storage]
            else:
                first_at[storage] = name
                self._tensors[name] = tensor.detach()
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


class View(Source):
    """Some tensors of another source, under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self._name_of = source, dict(names)
        self.location, self.revision, self.directory, self.config = (
            source.location,
            source.revision,
            source.directory,
            source.config,
        )

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._name_of)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self.source.shape(self._name_of[name])

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self.source.dtype(self._name_of[name])

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self.source.read(self._name_of[name])


class Fingerprinted(View):
    """A source that notes the hash of every tensor as it is read, so that its identity costs no pass of its own."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, {name: name for name in source.names})
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> Tensor:  # noqa: D102
        tensor = super().read(name)
        if name not in self.hashes:
            self.hashes[name] = hash_values(tensor)
        return tensor


def open_source(weights: str | Path | nn.Module | Mapping[str, Tensor] | Source) -> Source:
    """Weights to read from.

    Args:
        weights: A Hugging Face directory (one file or sharded), a ``.safetensors`` file, a Lightning ``.ckpt``, a hub id, a module or a state
            dict.

    Raises:
        SourceError: The path is nothing of that kind, or would have to be unpickled.
        CorruptFileError: A file is truncated or its index does not match.
    """
    if isinstance(weights, Source):
        return weights
    if isinstance(weights, nn.Module | Mapping):
        return StateDictSource(weights)
    path = Path(weights)
    if path.is_dir():
        return _open_directory(path, str(weights))
    if path.is_file():
        return _open_file(path)
    if _HUB_ID.match(str(weights)):
        return _open_hub(str(weights))
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
    if (path / MANIFEST_NAME).exists():
        raise SourceError(f"{path} is a task vector, and a model is needed here")
    if (path / "adapter_config.json").exists():
        raise SourceError(
            f"{path} is a peft adapter, not whole weights. Merge it into its base model first: "
            "PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)"
        )
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
    return StateDictSource(checkpoint["state_dict"], str(path))


def _open_hub(hub_id: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{hub_id} is no local directory and could not be had from the hub ({type(error).__name__}). Check the spelling; offline, give a directory."
        ) from error
    source = _open_directory(directory, hub_id)
    source.revision = directory.name
    return source


def pair(start: Source, tuned: Source) -> tuple[Source, Source]:
    """Two sources under one set of names: those of the start.

    The module prefix of a Lightning checkpoint is taken off, further modules of the LightningModule are left out, and a tied tensor that
    one side stores once and the other twice counts once.

    Raises:
        LayoutMismatchError: Names or shapes differ otherwise.
    """
    tuned = named_like(tuned, start)
    start = named_like(start, tuned)
    start_only, tuned_only = set(start.names) - set(tuned.names), set(tuned.names) - set(start.names)
    lone = {name for name in start_only if not _stored_twice(start, name, tuned)}
    lone |= {name for name in tuned_only if not _stored_twice(tuned, name, start)}
    if lone:
        raise LayoutMismatchError(
            f"{start.label} and {tuned.label} must hold the same tensors; on one side only are {first_three(lone)}. Are both of one architecture? "
            "Transformers saves some architectures under other names than the module has: then give both sides as saved directories, or both as modules."
        )
    common = [name for name in start.names if name not in start_only]
    odd = [name for name in common if start.shape(name) != tuned.shape(name)]
    if odd:
        raise LayoutMismatchError(_shape_message(start, tuned, odd))
    kinds = [(name, side.dtype(name)) for name in common for side in (start, tuned)]
    unusable = {name for name, dtype in kinds if dtype not in _DTYPES.values()}
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
            "Resize the token embeddings of one of them first."
        )
    return f"{start.label} and {tuned.label} must have the same shapes; different are {first_three(odd)}, {name} with {one} and {other}"


def named_like(source: Source, reference: Source) -> Source:
    """A source in memory under the names of a reference: without the module prefix, each tied tensor by the name the reference has."""
    if not isinstance(source, StateDictSource):
        return source
    wanted = set(reference.names)
    prefix = "" if set(source.names) & wanted else _module_prefix(source, wanted)
    names = {name[len(prefix) :]: name for name in source.names if name.startswith(prefix)}
    for alias, held in source.tied.items():
        if alias.startswith(prefix) and alias[len(prefix) :] in wanted and held[len(prefix) :] not in wanted:
            names.pop(held[len(prefix) :], None)
            names[alias[len(prefix) :]] = held
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


def _stored_twice(source: Source, name: str, other: Source) -> bool:
    """Whether a tensor that only this source lists is a copy of one that both have: tied weights, stored under two names."""
    if not any((side.config or {}).get("tie_word_embeddings", False) for side in (source, other)):
        return False
    twins = (twin for twin in other.names if twin in source.names and source.shape(twin) == source.shape(name))
    return any(torch.equal(source.read(twin), source.read(name)) for twin in twins)
