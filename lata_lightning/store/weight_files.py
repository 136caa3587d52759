"""The files of a model directory that hold its weights, found by name and index without reading tensors; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_three
from lata_lightning.store.directories import WEIGHT_SUFFIXES, model_config, read_object

MODEL_FILES = tuple(f"{name}{more}" for name in ("model.safetensors", "pytorch_model.bin") for more in ("", ".index.json"))
"""The files in which transformers looks for the weights of a directory, in this order."""
# Whole models that transformers does not load by itself: of Mistral, LitGPT and Meta.
_FURTHER = ("consolidated.safetensors", "lit_model.pth", "consolidated.00.pth")


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
    """Return the safetensors files of a stem: ``stem.safetensors``, or those that its index lists; none if there is neither.

    Raises:
        CorruptFileError: The index is no JSON, names a file outside the directory, or lists other files than the single one that is there too.
    """
    files = _files_of(directory, f"{stem}.safetensors")
    return [] if files is None else list(files.paths)


def weight_files(path: Path, config: Mapping[str, Any] | None = None) -> Files:
    """Return the files of a model directory that hold its weights: those that transformers would load.

    Args:
        path: The directory.
        config: Content of its config.json, which may name the file.

    Raises:
        SourceError: There are none.
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
    """Return advice on a directory without weights under the usual names, from what it has instead."""
    inside = sorted(directory.iterdir()) if directory.is_dir() else []
    # Sentence-transformers, pipelines and training runs have such folders.
    folders = [folder.name for folder in inside if any((folder / name).is_file() for name in (*MODEL_FILES, *_FURTHER))]
    if folders:
        return f"Folders in it hold weights, {first_three(folders)}: give the one you mean."
    files = [file.name for file in inside if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    return f"Its other files are {first_three(files)}: give the one you mean." if files else "Is it complete?"


def _named_files(directory: Path, named: object) -> Files:
    """Return the files that a config names instead of the usual ones."""
    name = named.removesuffix(".index.json") if isinstance(named, str) else ""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CorruptFileError(f"transformers_weights in {directory / 'config.json'} must name a file in its directory, it is {named!r}")
    if name == named:
        return Files((directory / name,), True)
    return _listed_files(directory, directory / str(named), True)


def home_of(file: Path) -> Path | None:
    """Return the model directory whose weights are all in one file; None if the file is in no such directory."""
    directory = file.parent
    if not (directory / "config.json").is_file():
        return None
    try:
        files = weight_files(directory, model_config(directory))
    except LataError:
        return None
    return directory if files.paths == (file,) else None


def _files_of(directory: Path, name: str) -> Files | None:
    """Return the single file of that name, or the shards that its index lists; None if there is neither."""
    single, index = directory / name, directory / f"{name}.index.json"
    safetensors = name.endswith(".safetensors")
    if single.is_file():
        _check_alone(single, index)
        return Files((single,), safetensors)
    return _listed_files(directory, index, safetensors) if index.is_file() else None


def _listed_files(directory: Path, index: Path, safetensors: bool) -> Files:
    """Return the shards that an index lists."""
    listed = _weight_map(index)
    missing = {file for file in listed.values() if not (directory / file).exists()}
    if missing:
        raise CorruptFileError(f"{directory} lacks files that {index.name} names, {first_three(missing)}. Copy or download it again.")
    return Files(tuple(directory / file for file in sorted(set(listed.values()))), safetensors, index, frozenset(listed))


def _check_alone(single: Path, index: Path) -> None:
    """Refuse a complete set of shards next to a single file. An incomplete set is ignored, as transformers does."""
    try:
        listed = set(_weight_map(index).values()) - {single.name} if index.is_file() else set()
    except CorruptFileError:
        # The index is not read, as the single file comes first.
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
        raise CorruptFileError(f"{index} may only name {suffix.removeprefix('.')} files in its directory, it names {foreign[:3]}")
    return listed
