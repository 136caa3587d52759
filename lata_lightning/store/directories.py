"""What a path is and which files belong to it, told without reading tensors; nothing here needs torch, which takes a second to import."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_three
from lata_lightning.store.descriptors import unreadable

MANIFEST_NAME = "task_vector.json"
MERGE_RECORD = "merge.json"
SCORES_NAME = "scores.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Whole models that transformers does not load by itself: of Mistral, LitGPT and Meta.
_FURTHER = ("consolidated.safetensors", "lit_model.pth", "consolidated.00.pth")
MODEL_FILES = tuple(f"{name}{more}" for name in ("model.safetensors", "pytorch_model.bin") for more in ("", ".index.json"))
"""The files by which transformers knows the weights in a directory, the first that is there."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# Of a hub repository everything is fetched but the same weights in other formats; folders may hold parts with pickled weights of their own.
_HUB_PICKLES = ["pytorch_model*", "consolidated*", "*.pt", "*.pth", "*.ckpt"]
_HUB_OTHERS = [
    "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "onnx/*", "openvino/*", "coreml/*", "original/*",
    "optimizer*", "checkpoint-*", "runs/*",
]  # fmt: skip


def holds_vector(path: str | Path) -> bool:
    """Whether a path is a saved task vector (and not, say, a model)."""
    return (Path(path) / MANIFEST_NAME).exists()


def holds_adapter(path: str | Path) -> bool:
    """Whether a path is a peft adapter directory."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_directory(path: str | Path) -> Path | None:
    """The peft adapter directory that a path means; None if it is something else.

    Args:
        path: The directory, its file of weights, or a directory that holds nothing but one adapter in a folder of its own, as peft saves an
            adapter of another name than ``default``. Where a directory is an adapter and has others in folders, it is meant itself, as to peft.

    Raises:
        SourceError: It holds several adapters in folders of their own.
    """
    found = Path(path)
    if found.name in ADAPTER_WEIGHTS and holds_adapter(found.parent):
        return found.parent
    if holds_adapter(found) or not found.is_dir():
        return found if holds_adapter(found) else None
    try:
        inside = sorted(found.iterdir())
    except OSError as error:
        raise unreadable(found, error) from error
    if any(file.suffix in _WEIGHT_SUFFIXES or file.name in ("config.json", MANIFEST_NAME) for file in inside):
        return None
    folders = [folder for folder in inside if holds_adapter(folder)]
    if len(folders) > 1:
        raise SourceError(
            f"{path} holds several adapters, {first_three(folder.name for folder in folders)}: give one of them, such as {folders[0]}"
        )
    return folders[0] if folders else None


def find_weights(weights: str | Path) -> tuple[Path, str | None]:
    """A local file or directory, or the snapshot of a hub repository with its commit.

    Raises:
        SourceError: There is neither.
    """
    path = Path(weights)
    try:
        if path.stat():
            return path, None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as error:
        raise unreadable(path, error) from error
    if _HUB_ID.match(str(weights)):
        return _download(str(weights))
    raise SourceError(
        f"{weights} does not exist: expected a model directory, a file with weights (safetensors, .ckpt, .bin, .pt, .pth), or a hub id such as 'org/name'"
    )


def find_directory(weights: str | Path) -> tuple[Path, str | None]:
    """As ``find_weights``, for what must be a directory.

    Raises:
        SourceError: There is none.
    """
    path, revision = find_weights(weights)
    if not path.is_dir():
        raise SourceError(f"{weights} is a file where a model directory is expected")
    return path, revision


def local_directory(location: str | None) -> Path | None:
    """Where the files of a model lie on this machine: a directory, or a snapshot that the hub's cache holds; None for anything else."""
    if location is None or Path(location).is_dir():
        return None if location is None else Path(location)
    if not _HUB_ID.match(location):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(location, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


class Files(NamedTuple):
    """The files with the weights of a model.

    Attributes:
        paths: The files, in the order in which they are read.
        safetensors: Whether they are safetensors files; otherwise ``torch.save`` wrote them.
        index_file: The index that lists them; None for a single file.
        listed: Names of the tensors that the index lists.
    """

    paths: tuple[Path, ...]
    safetensors: bool
    index_file: Path | None = None
    listed: frozenset[str] = frozenset()


def shard_files(directory: Path, stem: str) -> list[Path]:
    """The safetensors files of a stem: ``stem.safetensors``, or those its index lists; none if there is neither.

    Raises:
        CorruptFileError: The index is no JSON, names a file outside the directory, or lists other files than the single one that is there too.
    """
    files = _files_of(directory, f"{stem}.safetensors")
    return [] if files is None else list(files.paths)


def weight_files(path: Path, config: Mapping[str, Any] | None = None) -> Files:
    """The files of a model directory that hold its weights: those that transformers would load.

    Args:
        path: The directory.
        config: Content of its config.json, which may name the file.

    Raises:
        SourceError: It holds none.
        CorruptFileError: The index cannot be read, or there are two sets of weights.
    """
    named = (config or {}).get("transformers_weights")
    if named:
        return _named_files(path, named)
    for name in ("model.safetensors", "pytorch_model.bin", *_FURTHER):
        files = _files_of(path, name)
        if files is not None:
            return files
    raise SourceError(f"{path} holds no model.safetensors and no pytorch_model.bin, nor an index of either. {_what_else(path)}")


def _what_else(directory: Path) -> str:
    """What a directory without weights under the usual names holds instead, as an advice."""
    inside = sorted(directory.iterdir()) if directory.is_dir() else []
    # As those of sentence-transformers, of pipelines, and of the checkpoints of a training run.
    folders = [folder.name for folder in inside if any((folder / name).is_file() for name in (*MODEL_FILES, *_FURTHER))]
    if folders:
        return f"Folders in it hold weights, {first_three(folders)}: give the one that is meant."
    files = [file.name for file in inside if file.suffix in _WEIGHT_SUFFIXES and file.is_file()]
    return f"Its other files are {first_three(files)}: give the one that is meant." if files else "Is it complete?"


def _named_files(directory: Path, named: object) -> Files:
    """The files that a config names in place of the usual ones."""
    name = named.removesuffix(".index.json") if isinstance(named, str) else ""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CorruptFileError(f"transformers_weights in {directory / 'config.json'} must name a file in its directory, it is {named!r}")
    if name == named:
        return Files((directory / name,), True)
    return _listed_files(directory, directory / str(named), True)


def home_of(file: Path) -> Path | None:
    """The model directory whose weights are one file; None if the file lies in none, or is not all of its weights."""
    directory = file.parent
    if not (directory / "config.json").is_file():
        return None
    try:
        files = weight_files(directory, model_config(directory))
    except LataError:
        return None
    return directory if files.paths == (file,) else None


def _files_of(directory: Path, name: str) -> Files | None:
    """The single file of that name, or the shards that its index lists; None if there is neither."""
    single, index = directory / name, directory / f"{name}.index.json"
    safetensors = name.endswith(".safetensors")
    if single.is_file():
        _check_alone(single, index)
        return Files((single,), safetensors)
    return _listed_files(directory, index, safetensors) if index.is_file() else None


def _listed_files(directory: Path, index: Path, safetensors: bool) -> Files:
    """The shards that an index lists."""
    listed = _weight_map(index)
    missing = {file for file in listed.values() if not (directory / file).exists()}
    if missing:
        raise CorruptFileError(f"{directory} lacks files that {index.name} names, {first_three(missing)}. Copy or download it again.")
    return Files(tuple(directory / file for file in sorted(set(listed.values()))), safetensors, index, frozenset(listed))


def _check_alone(single: Path, index: Path) -> None:
    """Refuse a whole set of shards beside a single file. What is left of an older set is passed over, as transformers does."""
    try:
        listed = set(_weight_map(index).values()) - {single.name} if index.is_file() else set()
    except CorruptFileError:
        # Nobody reads it: the single file comes first.
        return
    if listed and all((single.parent / file).is_file() for file in listed):
        raise CorruptFileError(
            f"{single.parent} must hold one set of weights; it holds {single.name} and the {len(listed)} shards of {index.name}, {first_three(listed)}. "
            f"transformers loads {single.name}: remove that, or the index and its shards."
        )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed: dict[str, str] = read_object(index)["weight_map"]
        files = set(listed.values())
    except (KeyError, AttributeError, TypeError) as error:
        raise CorruptFileError(f"{index} is no shard index ({error!r})") from error
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    foreign = [name for name in files if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix)]
    if foreign:
        raise CorruptFileError(f"{index} may only name {suffix.removeprefix('.')} files beside it, it names {foreign[:3]}")
    return listed


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        CorruptFileError: It is missing, or is no JSON in UTF-8.
        SourceError: It cannot be opened.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CorruptFileError: It cannot be read, or is something else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def json_rows(lines: Iterable[str], path: str | Path) -> Iterator[dict[str, Any]]:
    """The JSON objects on the lines of a file, blank lines passed over.

    Args:
        lines: Its lines.
        path: Its name, for messages.

    Raises:
        CorruptFileError: A line is no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"line {number} of {path} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise CorruptFileError(f"line {number} of {path} must be a JSON object, it is a {type(row).__name__}")
        yield row


def model_config(directory: Path) -> dict[str, Any] | None:
    """The content of a model directory's config.json; None if there is none."""
    path = directory / "config.json"
    return read_object(path) if path.is_file() else None


def _download(hub_id: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, ignore_patterns=[*_HUB_PICKLES, *_HUB_OTHERS]))
        if not any(directory.glob("*.safetensors")):
            # Only where there is nothing else: most repositories hold both, and each is the whole model.
            directory = Path(snapshot_download(hub_id, ignore_patterns=_HUB_OTHERS))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{hub_id} is no local directory and could not be had from the hub ({type(error).__name__}). Check the spelling; offline, give a directory."
        ) from error
    return directory, directory.name
