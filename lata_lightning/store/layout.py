"""Locations of tensors in files, together without torch, which takes a second to import."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.layers import layer_map
from lata_lightning.store.descriptors import DESCRIPTORS, FileIdentity, fill
from lata_lightning.store.dtypes import dtype_name, is_known, is_readable, item_size

_PIECE = 1 << 20
_LONGEST_HEADER = 100_000_000
# Beyond this, sizes in bytes do not fit the integers of torch.
_VAST = 1 << 59


class Entry(NamedTuple):
    """One tensor: shape, and dtype by its code in safetensors files."""

    shape: tuple[int, ...]
    code: str


class Span(NamedTuple):
    """One tensor in a file.

    Attributes:
        file: The file.
        begin: Offset of its first entry, in bytes.
        entry: Shape and dtype.
        strides: Entries from one index to the next along each axis; None for a contiguous tensor.
    """

    file: FileIdentity
    begin: int
    entry: Entry
    strides: tuple[int, ...] | None = None


def safetensors_spans(path: Path) -> dict[str, Span]:
    """Return the tensors of a safetensors file, sorted by name, from its header, which is checked against the size of the file.

    The safetensors library is not used, as it calls a file missing where too many are open.

    Raises:
        CorruptFileError: The file is missing or damaged.
        SourceError: It cannot be read.
    """
    file = DESCRIPTORS.identify(path)
    try:
        size, header = _header(file)
        return {name: _span(file, 8 + size, header[name]) for name in sorted(header)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CorruptFileError(f"{path} is no readable safetensors file ({what}). Is it complete? Copy or download it again.") from error


def _header(file: FileIdentity) -> tuple[int, dict[str, Any]]:
    """Return the size of the header and the tensors it lists, which must fill the rest of the file without a gap."""
    if file.size < 8:
        raise ValueError("it is shorter than its header")
    size = int.from_bytes(_bytes(file, 0, 8), "little")
    if size > min(file.size - 8, _LONGEST_HEADER):
        raise ValueError("it is shorter than its header")
    pairs: list[tuple[str, Any]] = json.loads(_bytes(file, 8, size).decode("utf-8"), object_pairs_hook=list)
    header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
    if len(header) < len([name for name, _ in pairs if name != "__metadata__"]):
        raise ValueError("it lists a tensor twice")
    end = 0
    for begin, last in sorted(_numbers(entry["data_offsets"]) for entry in header.values()):
        if begin != end or last < begin:
            raise ValueError("its tensors overlap, or leave gaps")
        end = last
    if end != file.size - 8 - size:
        raise ValueError(f"its tensors take {end} bytes, and {file.size - 8 - size} are there")
    return size, header


def _span(file: FileIdentity, data: int, entry: Mapping[str, Any]) -> Span:
    shape, code, (begin, end) = _numbers(entry["shape"]), str(entry["dtype"]), _numbers(entry["data_offsets"])
    if is_known(code) and end - begin != math.prod(shape) * item_size(code):
        raise ValueError("a tensor has another size than its shape")
    return Span(file, data + begin, Entry(shape, code))


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("a shape or an offset is no list of whole numbers")
    return tuple(values)


def _bytes(file: FileIdentity, begin: int, size: int) -> bytes:
    data = bytearray(size)
    fill(memoryview(data), file, begin)
    return bytes(data)


def joined(parts: Iterable[Mapping[str, Span]]) -> dict[str, Span]:
    """Return the tensors of several files together.

    Raises:
        CorruptFileError: Two files have different values of one tensor.
    """
    together: dict[str, Span] = {}
    for part in parts:
        twice = {name for name, span in part.items() if name in together and not _same_bytes(span, together[name])}
        if twice:
            name = min(twice)
            raise CorruptFileError(
                f"{together[name].file.path} and {part[name].file.path} must hold the same values of each tensor; they differ in {first_three(twice)}. "
                "One of them is left over from another model: remove or download them again."
            )
        together = {**part, **together}
    return together


def check_readable(label: str, entries: Mapping[str, Entry]) -> None:
    """Refuse tensors of dtypes that cannot be read, and of shapes that no tensor can have.

    Raises:
        SourceError, CorruptFileError: There are some.
    """
    vast = {name for name, entry in entries.items() if math.prod(max(1, length) for length in entry.shape) >= _VAST}
    if vast:
        raise CorruptFileError(f"{label} holds tensors of impossible shapes, {first_three(vast)}. Copy or download it again.")
    odd = {name for name, entry in entries.items() if not is_readable(entry.code)}
    if odd:
        codes = ", ".join(sorted({repr(entries[name].code) for name in odd}))
        raise SourceError(f"{label} holds tensors of dtype {codes}, which are not supported: {first_three(odd)}. Convert them first.")


def sizes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return facts about tensors for ``lata inspect``: how many, with how many entries, of which dtypes."""
    return {
        "tensors": len(entries),
        "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "dtype": ", ".join(sorted({dtype_name(entry.code) for entry in entries.values()})),
    }


def weights_facts(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return facts about the weights of a model for ``lata inspect``: those of its tensors, and its layers."""
    layers = layer_map(entries)
    return {
        **sizes(entries),
        "blocks": len(layers.blocks),
        "first and last block": f"{layers.blocks[0]} … {layers.blocks[-1]}" if layers.blocks else None,
        "outside the blocks": layers.outside(),
    }


def _same_bytes(one: Span, other: Span) -> bool:
    if one.entry != other.entry or one.strides != other.strides:
        return False
    size = math.prod(one.entry.shape) * item_size(one.entry.code)
    first, second = bytearray(_PIECE), bytearray(_PIECE)
    for begin in range(0, size, _PIECE):
        count = min(_PIECE, size - begin)
        for target, span in ((first, one), (second, other)):
            fill(memoryview(target)[:count], span.file, span.begin + begin)
        if first[:count] != second[:count]:
            return False
    return True
