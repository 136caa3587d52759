"""What a path is and which files belong to it, told without reading tensors; nothing here needs torch, which takes a second to import."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lata_lightning.errors import CorruptFileError, SourceError, first_three

MANIFEST_NAME = "task_vector.json"
MERGE_RECORD = "merge.json"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


class Entry(NamedTuple):
    """One tensor of a safetensors file: shape, and dtype by its code in the file format."""

    shape: tuple[int, ...]
    code: str


def holds_vector(path: str | Path) -> bool:
    """Whether a path is a saved task vector (and not, say, a model)."""
    return (Path(path) / MANIFEST_NAME).exists()


def holds_adapter(path: str | Path) -> bool:
    """Whether a path is a peft adapter directory."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


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


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model directory.

    Raises:
        SourceError: The directory is a task vector, or holds no safetensors files.
        CorruptFileError: Its index cannot be read.
    """
    if holds_vector(path):
        raise SourceError(f"{path} is a task vector, and a model is needed here")
    files = shard_files(path, "model")
    if not files:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
            raise SourceError(
                f"{path} holds pickled weights only, which can run code when they are loaded. Convert them to safetensors first."
            )
        raise SourceError(f"{path} holds no model.safetensors and no model.safetensors.index.json")
    return files


def check_index(directory: Path, names: set[str]) -> None:
    """Refuse a directory whose shards lack tensors that its index lists, as when they come from two downloads."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        missing = set(json.loads(index.read_text("utf-8"))["weight_map"]) - names
        if missing:
            raise CorruptFileError(f"{index} lists tensors that its files do not hold, {first_three(missing)}. Copy the directory again.")


def file_layout(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header, which the library checks.

    Raises:
        CorruptFileError: The file is missing, or is not whole.
    """
    try:
        with safe_open(path, framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return {name: Entry(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing, though its index names it. Copy the directory again.") from error
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is no readable safetensors file ({error}). Is it complete? Copy or download it again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CorruptFileError: It cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{path} is no JSON ({error})") from error
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
        except ValueError as error:
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
        directory = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{hub_id} is no local directory and could not be had from the hub ({type(error).__name__}). Check the spelling; offline, give a directory."
        ) from error
    return directory, directory.name
