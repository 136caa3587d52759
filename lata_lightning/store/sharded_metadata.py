"""The ``.metadata`` of a sharded checkpoint (``torch.distributed.checkpoint``), read without torch and without running anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, SourceError, first_line
from lata_lightning.store.descriptors import DESCRIPTORS, FileIdentity, Window
from lata_lightning.store.layout import Entry
from lata_lightning.store.pickles import DAMAGE, Call, Global, Key, mapping, read_pickle
from lata_lightning.store.torch_archive import dtype_code, whole_numbers

METADATA = ".metadata"


class Chunk(NamedTuple):
    """A part of a tensor: its first index and its length along each axis, and the location of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: FileIdentity
    begin: int
    end: int


class ShardedTensor(NamedTuple):
    """A tensor in chunks."""

    name: str
    entry: Entry
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[Any, Any]:
    """Return the content of a sharded checkpoint, nested as it was saved, with a ``ShardedTensor`` for each tensor; anything else is left out.

    Raises:
        CorruptFileError: The metadata is damaged, or a file that it names is missing.
        SourceError: A file cannot be read.
    """
    path = directory / METADATA
    file = DESCRIPTORS.identify(path)
    try:
        return _nested(directory, _state(read_pickle(Window(file, 0, file.size))))
    except (*DAMAGE, CorruptFileError) as error:
        raise CorruptFileError(
            f"{path} is no readable metadata of a sharded checkpoint ({first_line(error)}). Copy the directory again."
        ) from error


def _nested(directory: Path, metadata: Mapping[str, Any]) -> dict[Any, Any]:
    files: dict[str, FileIdentity] = {}
    stored: dict[tuple[str, tuple[int, ...]], tuple[FileIdentity, int, int]] = {}
    for key, value in metadata["storage_data"].items():
        index, info = _state(key.value if isinstance(key, Key) else key), _state(value)
        if index.get("offset") is None:
            # The entry is no tensor.
            continue
        if info.get("transform_descriptors"):
            raise SourceError(f"{directory} is compressed ({info['transform_descriptors']}), which is not read. Save it without.")
        name = _file_name(info["relative_path"])
        if name not in files:
            files[name] = DESCRIPTORS.identify(directory / name)
        begin, length = whole_numbers((info["offset"], info["length"]))
        stored[index["fqn"], whole_numbers(index["offset"])] = files[name], begin, begin + length
    nested: dict[Any, Any] = {}
    paths = mapping(metadata.get("planner_data")) or {}
    for name, value in metadata["state_dict_metadata"].items():
        if isinstance(value, Call) and isinstance(value.function, Global) and _class_of(value) == "TensorStorageMetadata":
            first, *rest = paths.get(name) or (name,)
            tensor = _tensor(name, _state(value), stored)
            if rest:
                nested.setdefault(first, {})[".".join(str(part) for part in rest)] = tensor
            else:
                nested[first] = tensor
    return nested


def _tensor(
    name: str, state: Mapping[str, Any], stored: Mapping[tuple[str, tuple[int, ...]], tuple[FileIdentity, int, int]]
) -> ShardedTensor:
    shape = whole_numbers(state["size"])
    chunks = []
    for value in state["chunks"]:
        part = _state(value)
        offsets, sizes = whole_numbers(part["offsets"]), whole_numbers(part["sizes"])
        if math.prod(sizes) == 0:
            continue
        if len(offsets) != len(shape) or any(
            begin < 0 or size < 0 or begin + size > length for begin, size, length in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"a chunk of {name} lies outside of it")
        file, begin, end = stored[name, offsets]
        chunks.append(Chunk(offsets, sizes, file, begin, end))
    chunks.sort()
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or _overlap(chunks):
        raise ValueError(f"the chunks of {name} do not make it up")
    return ShardedTensor(name, Entry(shape, dtype_code(_dtype(state["properties"]))), tuple(chunks))


def _overlap(chunks: list[Chunk]) -> bool:
    """Return whether two chunks, sorted by their offsets, share an entry."""
    for number, one in enumerate(chunks):
        for other in chunks[number + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            if all(
                begin < second + length and second < begin + size
                for begin, size, second, length in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            ):
                return True
    return False


def _dtype(properties: Call) -> Global:
    """Return the dtype among the properties of a tensor, which are saved as a tuple."""
    dtype: Global = properties.state[0] if isinstance(properties.state, tuple) else _state(properties)["dtype"]
    return dtype


def _state(value: Any) -> dict[str, Any]:
    """Return the fields of an object in a pickle, which was not made."""
    state = value.state if isinstance(value, Call) else value
    if not isinstance(state, dict):
        raise TypeError(f"a {type(state).__name__} where fields are expected")
    return state


def _class_of(value: Call) -> str:
    function = value.function if isinstance(value.function, Global) else Global("", "")
    first = value.arguments[0] if function.module in ("copyreg", "copy_reg") and value.arguments else function
    return first.name if isinstance(first, Global) else ""


def _file_name(path: Any) -> str:
    """Return the name of a file in the directory of the metadata; anything else is refused, as names in files are no paths."""
    parts = path.arguments if isinstance(path, Call) else (path,)
    if len(parts) != 1 or not isinstance(parts[0], str) or Path(parts[0]).name != parts[0]:
        raise ValueError("it names a file outside of its directory")
    return parts[0]
