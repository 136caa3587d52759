"""Files of ``torch.save``, read without torch and without running anything: the content of the pickle, and the locations of tensors.

``torch.load`` is not used, so neither are its weaknesses (CVE-2025-32434 and CVE-2026-24747 let a file corrupt memory or run code), in any release.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_line
from lata_lightning.store.descriptors import FileIdentity, Window
from lata_lightning.store.dtypes import code_of_name, item_size
from lata_lightning.store.layout import Entry, Span
from lata_lightning.store.pickles import DAMAGE, Call, Global, Persistent, read_pickle

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of the files of ``torch.save``, since release 1.6 and before."""
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64", "IntStorage": "I32",
    "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}  # fmt: skip
_OTHER_NAMES = {"double": "F64", "float": "F32", "half": "F16", "long": "I64", "int": "I32"}
_REBUILT = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_WRAPPED = ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor")
# Subclasses of tensors that are stored like plain tensors.
_PLAIN_CLASSES = (("torch", "Tensor"), ("torch._tensor", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"))
_HEADER = struct.Struct("<4s22sHH")


class _Bytes(NamedTuple):
    """The location of the values of a storage: offset and size, in bytes."""

    begin: int
    size: int


class TorchArchive:
    """The content of a file, or part of a file, that ``torch.save`` wrote.

    Args:
        file, begin, end: The file, and the offsets of the part.

    Attributes:
        content: What was saved, as ``read_pickle`` gives it.

    Raises:
        CorruptFileError: It is damaged.
        SourceError: It is no file of ``torch.save``.
    """

    def __init__(self, file: FileIdentity, begin: int = 0, end: int | None = None) -> None:
        self._file, self._begin = file, begin
        window = Window(file, begin, file.size if end is None else end)
        try:
            magic = window.read(len(LEGACY))
            window.seek(0)
            self.content, self._storage = self._open_legacy(window) if magic == LEGACY else self._open_zip(window)
        except (*DAMAGE, OSError, zipfile.BadZipFile, struct.error) as error:
            raise _damaged(file, error) from error
        except CorruptFileError as error:
            raise _damaged(file, error) from error

    def tensor(self, value: object) -> Span | None:
        """Return the location of a tensor of the content; None if the value is no tensor.

        Raises:
            SourceError: The kind of tensor cannot be read.
            CorruptFileError: Its values are outside of the file.
        """
        try:
            return self._tensor(value)
        except (*DAMAGE, struct.error) as error:
            raise _damaged(self._file, error) from error

    def _tensor(self, value: object) -> Span | None:
        if not isinstance(value, Call) or not isinstance(value.function, Global):
            return None
        module, name = value.function
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            function, kind, arguments, _ = value.arguments
            if kind not in _PLAIN_CLASSES:
                raise SourceError(f"{self._file.path} holds tensors of the class {'.'.join(kind)}, which are not read. {_PLAIN}")
            return self._tensor(Call(function, arguments))
        if module != "torch._utils":
            return None
        if name in _WRAPPED:
            return self._tensor(value.arguments[0])
        if name in _REBUILT:
            return self._span(*value.arguments)
        if name.startswith("_rebuild"):
            raise SourceError(f"{self._file.path} holds tensors that only {name} of torch can rebuild. {_PLAIN}")
        return None

    def _span(self, reference: Persistent, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any) -> Span:
        kind, storage, key, _, count = reference.content[:5]
        shape, strides, (offset, count) = whole_numbers(shape), whole_numbers(strides), whole_numbers((offset, count))
        if kind != "storage" or len(shape) != len(strides) or min((offset, count, *shape, *strides)) < 0:
            raise ValueError("a tensor has an impossible layout")
        if len(reference.content) > 5 and reference.content[5] is not None:
            raise SourceError(f"{self._file.path} holds views of storages, as torch before 1.6 saved them. {_PLAIN}")
        code = self._code(storage, rest)
        size = item_size(code)
        extent = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) if all(shape) else 0
        values = self._storage(key)
        if (offset + extent) * size > values.size:
            raise ValueError("a tensor reaches beyond its values")
        if math.prod(shape) > extent and all(shape):
            raise SourceError(f"{self._file.path} holds expanded tensors, in which several entries share one value. {_PLAIN}")
        begin = self._begin + values.begin + offset * size
        return Span(self._file, begin, Entry(shape, code), None if _row_by_row(shape, strides) else strides)

    def _code(self, storage: Any, rest: tuple[Any, ...]) -> str:
        """Return the code of the dtype of a tensor: that of its storage, or one that is named separately, as newer dtypes are."""
        named = [value for value in rest if isinstance(value, Global) and value.module == "torch"]
        code = _code_of(named[0].name) if named else _STORAGES.get(storage.name)
        if code is None:
            raise SourceError(
                f"{self._file.path} holds tensors of {named[0].name if named else storage.name}, which are not read. {_PLAIN}"
            )
        return code

    def _open_zip(self, window: Window) -> tuple[Any, Callable[[Any], _Bytes]]:
        archive = zipfile.ZipFile(window)
        records = {entry.filename: entry for entry in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("two records have one name")
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise SourceError(f"{self._file.path} is a zip archive that torch.save did not write. Give the file with the weights.")
        root = roots[0]
        if root + "constants.pkl" in records:
            raise SourceError(
                f"{self._file.path} is a TorchScript archive, which holds a program. Save the state_dict() of torch.jit.load(…) and give that."
            )

        def part(name: str) -> _Bytes:
            entry = records[name]
            signature, _, name_length, extra_length = _HEADER.unpack(_read(window, entry.header_offset, _HEADER.size))
            begin = entry.header_offset + _HEADER.size + name_length + extra_length
            if signature != ZIP or entry.compress_type != zipfile.ZIP_STORED or begin + entry.file_size > window.size:
                raise ValueError(f"the record {name} is compressed or cut off")
            return _Bytes(begin, entry.file_size)

        def storage(key: Any) -> _Bytes:
            return part(f"{root}data/{key}")

        if root + "byteorder" in records and _read(window, *part(root + "byteorder")) != b"little":
            raise SourceError(f"{self._file.path} was written on a big-endian machine. Save it again on a little-endian one.")
        return read_pickle(_read(window, *part(root + "data.pkl"))), storage

    def _open_legacy(self, window: Window) -> tuple[Any, Callable[[Any], _Bytes]]:
        _, version, system = (read_pickle(window) for _ in range(3))
        if version != 1001 or not system["little_endian"]:
            raise ValueError("another version, or a big-endian machine")
        content, keys = read_pickle(window), read_pickle(window)
        sizes = _storage_sizes(content)
        storages: dict[Any, _Bytes] = {}
        position = window.tell()
        for key in keys:
            (count,) = struct.unpack("<q", _read(window, position, 8))
            code, expected = sizes[key]
            if count != expected:
                raise ValueError("a storage has another size than its tensors")
            storages[key] = _Bytes(position + 8, count * item_size(code))
            position += 8 + storages[key].size
        if position > window.size:
            raise EOFError("it is cut off")
        return content, storages.__getitem__


_PLAIN = "Save a state dict of plain tensors and give that."


def _storage_sizes(content: object) -> dict[Any, tuple[str, int]]:
    """Return the dtype and the number of entries of every storage that the content refers to, by its key."""
    sizes: dict[Any, tuple[str, int]] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Persistent):
            _, storage, key, _, count = value.content[:5]
            if storage.name not in _STORAGES:
                raise SourceError(f"its values are of the kind {storage.name}, which is not read")
            sizes[key] = (_STORAGES[storage.name], count)
        elif isinstance(value, str | int | float | bytes | Global | None) or id(value) in seen:
            continue
        else:
            seen.add(id(value))
            waiting += _parts(value)
    return sizes


def _parts(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Call):
        return [value.function, *value.arguments, *value.items.values(), *value.elements, value.state]
    return list(value) if isinstance(value, list | tuple) else []


def dtype_code(dtype: Global) -> str:
    """Return the code in safetensors files of a dtype that a pickle names.

    Raises:
        SourceError: No such dtype is read.
    """
    code = _code_of(dtype.name)
    if dtype.module != "torch" or code is None:
        raise SourceError(f"tensors of the dtype {dtype.name} are not read. {_PLAIN}")
    return code


def _code_of(name: str) -> str | None:
    """Return the safetensors code of a dtype by any name that torch has for it."""
    return code_of_name(name) or _OTHER_NAMES.get(name)


def whole_numbers(value: Any) -> tuple[int, ...]:
    """Return the numbers of a shape, which may be stored as a call of ``torch.Size``."""
    numbers = value.arguments[0] if isinstance(value, Call) else value
    if not all(type(number) is int for number in numbers):
        raise TypeError("a shape must be made of whole numbers")
    return tuple(numbers)


def _row_by_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return not all(shape)
        expected *= length
    return True


def _read(window: Window, begin: int, size: int) -> bytes:
    window.seek(begin)
    data = window.read(size)
    if len(data) < size:
        raise EOFError("it is cut off")
    return data


def _damaged(file: FileIdentity, error: BaseException) -> LataError:
    return CorruptFileError(f"{file.path} is no readable checkpoint ({first_line(error)}). Is it complete? Copy or download it again.")
