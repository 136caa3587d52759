"""What a path is, and the JSON files in it; nothing here needs torch, which takes a second to import."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.descriptors import unreadable

MANIFEST_NAME = "task_vector.json"
MERGE_RECORD = "merge.json"
SCORES_NAME = "scores.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""Suffixes of files of weights."""
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# What is not downloaded from a hub repository: the same weights in other formats. Folders may have modules with pickled weights of their own.
_HUB_PICKLES = ["pytorch_model*", "consolidated*", "*.pt", "*.pth", "*.ckpt"]
_HUB_OTHERS = [
    "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "onnx/*", "openvino/*", "coreml/*", "original/*",
    "optimizer*", "checkpoint-*", "runs/*",
]  # fmt: skip


def holds_vector(path: str | Path) -> bool:
    """Return whether a path is a saved task vector (and not, say, a model)."""
    return (Path(path) / MANIFEST_NAME).exists()


def holds_adapter(path: str | Path) -> bool:
    """Return whether a path is a peft adapter directory."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_directory(path: str | Path) -> Path | None:
    """Return the peft adapter directory that a path refers to; None if it is something else.

    Args:
        path: The directory, its file of weights, or a directory with one adapter in a folder and nothing else, as peft saves an adapter whose name is
            not ``default``. A directory that is an adapter and has others in folders is that adapter, as for peft.

    Raises:
        SourceError: It has several adapters in folders.
    """
    candidate = Path(path)
    if candidate.name in ADAPTER_WEIGHTS and holds_adapter(candidate.parent):
        return candidate.parent
    if holds_adapter(candidate) or not candidate.is_dir():
        return candidate if holds_adapter(candidate) else None
    try:
        inside = sorted(candidate.iterdir())
    except OSError as error:
        raise unreadable(candidate, error) from error
    if any(file.suffix in WEIGHT_SUFFIXES or file.name in ("config.json", MANIFEST_NAME) for file in inside):
        return None
    folders = [folder for folder in inside if holds_adapter(folder)]
    if len(folders) > 1:
        raise SourceError(
            f"{path} holds several adapters, {first_three(folder.name for folder in folders)}: give one of them, such as {folders[0]}"
        )
    return folders[0] if folders else None


def find_weights(weights: str | Path) -> tuple[Path, str | None]:
    """Return a local file or directory and None, or the snapshot of a hub repository and its commit.

    Raises:
        SourceError: Neither exists.
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
    """Return a directory as ``find_weights`` does.

    Raises:
        SourceError: There is none.
    """
    path, revision = find_weights(weights)
    if not path.is_dir():
        raise SourceError(f"{weights} is a file where a model directory is expected")
    return path, revision


def local_directory(location: str | None) -> Path | None:
    """Return the local directory of a model: itself, or the snapshot in the hub's cache; None if there is none."""
    if location is None or Path(location).is_dir():
        return None if location is None else Path(location)
    if not _HUB_ID.match(location):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(location, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def read_json(path: Path) -> Any:
    """Return the JSON in a file.

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
    """Return the JSON object in a file.

    Raises:
        CorruptFileError: It cannot be read, or is something else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def json_rows(lines: Iterable[str], path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects on the lines of a file, skipping blank lines.

    Args:
        lines: The lines of the file.
        path: Name of the file, for messages.

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
    """Return the content of a model directory's config.json; None if there is none."""
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
            f"{hub_id} is no local directory and could not be downloaded ({type(error).__name__}). Check the spelling; offline, give a directory."
        ) from error
    return directory, directory.name
