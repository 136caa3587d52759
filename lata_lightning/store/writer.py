"""Writing named tensors: shard by shard, streamed, and whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lata_lightning.errors import LataError, OutputError, first_three
from lata_lightning.store.hashing import hash_stored, tensor_bytes

MAX_SHARD_BYTES = 2 << 30
PARTIAL_MARK = ".partial-"
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write in all."""


def check_free(path: Path) -> None:
    """Refuse an output path that exists, before any work is done."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already. Choose another output path, or remove it first.")


@contextmanager
def atomic_directory(path: Path, size: int = 0) -> Iterator[Path]:
    """A new directory that appears under its name only when the block has ended well.

    Args:
        path: The final name; it must not exist, its parents are made.
        size: Bytes about to be written, checked against the free space of the disk.

    Yields:
        An empty directory beside ``path``, on the same file system, to write into.

    Raises:
        OutputError: The path exists, cannot be written, or the disk is (or becomes) full. Nothing is left behind.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise OutputError(f"{path} needs {size:,} bytes and the disk has {free:,} left. Make room, or write elsewhere.")
        # Beside the target, as a rename is only atomic within one file system.
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL_MARK}", dir=path.parent))
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        check_free(path)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _output_error(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_directory(new: Path, old: Path) -> None:
    """Put a finished directory in the place of an older one, which goes only when the new one stands."""
    if not old.exists():
        new.rename(old)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}{PARTIAL_MARK}", dir=old.parent))
    old.rename(aside / old.name)
    new.rename(old)
    shutil.rmtree(aside)


class ShardWriter:
    """Safetensors files of one directory, written tensor by tensor in a layout that is known beforehand.

    Args:
        directory: Where the files go.
        stem: File name without suffix: ``stem.safetensors`` for one file, ``stem-0000i-of-0000N.safetensors`` and an index for several.
        layout: Dtype and shape by tensor name.
        max_shard_bytes: Bytes of tensors per file; a larger tensor gets a file of its own.
        metadata: Strings for the header of each file.

    Tensors have to be written in the order of ``order``. Leaving the ``with`` block writes the index; the hashes are then in ``hashes``.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        layout: Layout,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._directory, self._stem, self._layout = directory, stem, layout
        self._metadata = dict(metadata or {})
        odd = [name for name, (dtype, _) in layout.items() if dtype not in _CODES]
        if odd:
            raise LataError(f"safetensors files cannot hold every dtype; {layout[odd[0]][0]} and the like are in {first_three(odd)}")
        self._shards = _split(layout, max_shard_bytes)
        self._file_of = {name: self._file_name(index) for index, shard in enumerate(self._shards) for name in shard}
        self._starts = {shard[0]: shard for shard in self._shards}
        self._open: BinaryIO | None = None
        self._pending = iter(self.order)
        self.hashes: dict[str, str] = {}
        self.written = 0

    @property
    def order(self) -> list[str]:
        """Tensor names in the order in which they must be written."""
        return [name for shard in self._shards for name in shard]

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor and note the hash of its bytes."""
        expected = next(self._pending, None)
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise LataError(f"tensor {name!r} was written out of turn: {expected!r} was due, as {self._layout.get(expected or '')}")
        if name in self._starts:
            self._start_file(self._starts[name])
        if self._open is not None:
            self._open.write(tensor_bytes(tensor))
        self.hashes[name] = hash_stored(tensor)
        self.written += _tensor_size(tensor.dtype, tensor.shape)

    def __enter__(self) -> ShardWriter:
        if not self._layout:
            self._start_file([])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_file()
        if kind is not None:
            return
        missing = list(self._pending)
        if missing:
            raise LataError(f"not every tensor of the layout was written; missing are {first_three(missing)}")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": layout_size(self._layout)},
                "weight_map": {name: self._file_of[name] for name in sorted(self._layout)},
            }
            write_json(self._directory / f"{self._stem}.safetensors.index.json", index)

    def _file_name(self, index: int) -> str:
        count = len(self._shards)
        return f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{index + 1:05d}-of-{count:05d}.safetensors"

    def _start_file(self, shard: list[str]) -> None:
        self._end_file()
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for name in shard:
            dtype, shape = self._layout[name]
            end = offset + _tensor_size(dtype, shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._file_of[shard[0]] if shard else f"{self._stem}.safetensors"
        self._open = (self._directory / file).open("wb")
        self._open.write(len(text).to_bytes(8, "little") + text)

    def _end_file(self) -> None:
        if self._open is not None:
            file, self._open = self._open, None
            with file:
                file.flush()
                os.fsync(file.fileno())


def layout_size(layout: Layout) -> int:
    """Bytes that the tensors of a layout take."""
    return sum(_tensor_size(dtype, shape) for dtype, shape in layout.values())


def float_dtype(name: str) -> torch.dtype:
    """The dtype of that name; an error that lists the choices for any other."""
    if name not in FLOAT_DTYPES:
        raise LataError(f"unknown dtype {name!r}; choose one of {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def write_json(path: Path, data: Any) -> None:
    """Write JSON that a person can read; NaN is refused, as no other reader would take it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, (dtype, shape) in layout.items():
        size = _tensor_size(dtype, shape)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    return [sorted(shard, key=lambda name: -layout[name][0].itemsize) for shard in shards]


def _tensor_size(dtype: torch.dtype, shape: Iterable[int]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full while writing {path}. Make room, or write elsewhere; nothing was left behind.")
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and path.exists():
        return OutputError(f"{path} exists already. Choose another output path, or remove it first.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
