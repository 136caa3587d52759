"""Writing named tensors: in shards, chunk by chunk, completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError, OutputError, first_three
from lata_lightning.store.dtypes import readable_code
from lata_lightning.store.hashing import StoredHash, tensor_bytes
from lata_lightning.store.output_policy import end_dry_run, may_replace_directory, may_replace_file, written_here

MAX_SHARD_BYTES = 2 << 30
_BYTES_AHEAD = 256 << 20
PARTIAL_MARK = ".partial-"
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write in all."""


def check_free(path: Path) -> None:
    """Refuse an output file that exists, before any work is done, unless the output policy lets it be replaced."""
    if (path.exists() or path.is_symlink()) and not may_replace_file(path):
        raise OutputError(f"{path} exists already. Choose another output path, or remove it first.")


def check_free_directory(path: Path) -> None:
    """Refuse an output directory that holds anything, before any work is done; one that is missing or empty is free.

    One that may be replaced by the output policy is free as well.

    Raises:
        OutputError: The path is a file or a link, the directory holds something, cannot be read, or cannot be replaced because it is a mount point.
    """
    if path.is_symlink() or not path.is_dir():
        # A directory never takes the place of a file.
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path} exists already. Choose another output path, or remove it first.")
        return
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise _output_error(path, error) from error
    if names and not may_replace_directory(path):
        raise OutputError(
            f"{path} exists already and is not empty, it holds {first_three(names)}. Choose another output path, or remove it first"
            f"{'; --overwrite replaces what lata has written' if written_here(path) else ''}."
        )
    if path.is_mount():
        raise OutputError(f"{path} is a mount point, which cannot be replaced by the finished output. Name a new folder below it.")


@contextmanager
def atomic_directory(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a new directory that appears under its name only when the block ends without an error.

    Args:
        path: The final name; nothing or an empty directory may have it, or what the output policy lets be replaced. Its parents are made.
        size: Bytes about to be written, checked against the free space of the disk.

    Yields:
        An empty directory next to ``path``, on the same file system, to write into.

    Raises:
        OutputError: The path holds something, cannot be written, or the disk is (or becomes) full. Nothing is left behind.
        DryRun: A dry run is in force.
    """
    check_free_directory(path)
    try:
        present = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(present, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        free = shutil.disk_usage(present).free
        if size > free:
            raise OutputError(f"{path} needs {size:,} bytes and the disk has {free:,} left. Make room, or write elsewhere.")
        end_dry_run(path, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the directory of the target, as a rename is only atomic within one file system.
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL_MARK}", dir=path.parent))
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        check_free_directory(path)
        replace_directory(partial, path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _output_error(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_directory(new: Path, old: Path) -> None:
    """Put a finished directory in the place of an older one, which is removed only when the new one has its name."""
    if not old.exists() or not any(old.iterdir()):
        new.rename(old)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}{PARTIAL_MARK}", dir=old.parent))
    old.rename(aside / old.name)
    try:
        new.rename(old)
    except BaseException:
        (aside / old.name).rename(old)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


class ShardWriter:
    """Safetensors files of one directory, in a layout that is known beforehand. Tensors may be written in any order and by several threads.

    Args:
        directory: Directory of the files.
        stem: File name without suffix: ``stem.safetensors`` for one file, ``stem-0000i-of-0000N.safetensors`` and an index for several.
        layout: Dtype and shape by tensor name.
        max_shard_bytes: Bytes of tensors per file; a larger tensor gets a file of its own.
        metadata: Strings for the header of each file.
        progress: Called with the bytes written so far and the bytes in all.

    Leaving the ``with`` block writes the index. The hashes are then in ``hashes``, in the order of the layout.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        layout: Layout,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._directory, self._stem, self._layout = directory, stem, layout
        self._metadata = dict(metadata or {})
        odd = [name for name, (dtype, _) in layout.items() if readable_code(dtype) is None]
        if odd:
            raise LataError(f"safetensors files cannot hold every dtype; {layout[odd[0]][0]} and the like are in {first_three(odd)}")
        self._shards = _split(layout, max_shard_bytes)
        self._file_of = {name: self._file_name(index) for index, shard in enumerate(self._shards) for name in shard}
        self._open: dict[str, int] = {}
        self._begins: dict[str, int] = {}
        self._hashes: dict[str, str] = {}
        self._lock, self._progress = threading.Lock(), progress
        self._disk = ThreadPoolExecutor(1)
        self._on_disk: list[Future[None]] = []
        self.written, self._size = 0, layout_size(layout)

    @property
    def order(self) -> list[str]:
        """Tensor names, the largest first, so that several threads end at about the same time."""
        return sorted(self._layout, key=lambda name: -_tensor_size(*self._layout[name]))

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of the bytes of every tensor that is written."""
        return {name: self._hashes[name] for name in self._layout if name in self._hashes}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor and record the hash of its bytes."""
        if name in self._layout and tuple(tensor.shape) != self._layout[name][1]:
            raise LataError(f"tensor {name!r} has the shape {tuple(tensor.shape)}, in the layout it has {self._layout[name][1]}")
        self.stream(name, [tensor])

    def stream(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write a tensor chunk by chunk, in order, and record the hash of its bytes."""
        if name not in self._layout or name in self._hashes:
            raise LataError(f"tensor {name!r} {'was written before' if name in self._hashes else 'is not in the layout'}")
        dtype, shape = self._layout[name]
        descriptor, offset, meter = self._open[self._file_of[name]], self._begins[name], StoredHash()
        end = offset + _tensor_size(dtype, shape)
        for piece in pieces:
            data = tensor_bytes(piece)
            if piece.dtype != dtype or offset + len(data) > end:
                raise LataError(f"tensor {name!r} does not fit the layout: expected {dtype} of the shape {shape}, got {piece.dtype}")
            meter.update(piece)
            offset = _write_at(descriptor, data, offset)
            with self._lock:
                before = self.written
                self.written += len(data)
                if before // _BYTES_AHEAD != self.written // _BYTES_AHEAD:
                    # The disk writes while the next tensors are computed, instead of only at the end.
                    self._on_disk.append(self._disk.submit(os.fsync, descriptor))
                if self._progress is not None:
                    self._progress(self.written, self._size)
        if offset != end:
            raise LataError(f"tensor {name!r} is not whole: {end - offset} bytes are missing")
        self._hashes[name] = meter.digest()

    def __enter__(self) -> ShardWriter:
        for shard in self._shards or [[]]:
            self._begin_file(shard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        opened = list(self._open.values())
        self._open.clear()
        try:
            self._disk.shutdown(cancel_futures=kind is not None)
            if kind is None:
                for waited in self._on_disk:
                    waited.result()
                for descriptor in opened:
                    os.fsync(descriptor)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        if kind is not None:
            return
        missing = [name for name in self._layout if name not in self._hashes]
        if missing:
            raise LataError(f"not every tensor of the layout was written; missing are {first_three(missing)}")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self._size},
                "weight_map": {name: self._file_of[name] for name in sorted(self._layout)},
            }
            write_json(self._directory / f"{self._stem}.safetensors.index.json", index)

    def _file_name(self, index: int) -> str:
        count = len(self._shards)
        return f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{index + 1:05d}-of-{count:05d}.safetensors"

    def _begin_file(self, shard: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for name in shard:
            dtype, shape = self._layout[name]
            end = offset + _tensor_size(dtype, shape)
            header[name] = {"dtype": readable_code(dtype), "shape": list(shape), "data_offsets": [offset, end]}
            self._begins[name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in shard:
            self._begins[name] += 8 + len(text)
        file = self._file_of[shard[0]] if shard else f"{self._stem}.safetensors"
        self._open[file] = os.open(self._directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _write_at(self._open[file], memoryview(len(text).to_bytes(8, "little") + text), 0)


def _write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write all bytes at an offset; return the offset after them."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
    return offset


def layout_size(layout: Layout) -> int:
    """Return the bytes that the tensors of a layout take."""
    return sum(_tensor_size(dtype, shape) for dtype, shape in layout.values())


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON; NaN is refused, as other readers would not accept it."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def replace_json(path: Path, data: Any) -> None:
    """Write a JSON file, over one of the same name; it appears whole or not at all. Missing parents are made.

    Raises:
        OutputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_json(partial, data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _output_error(path, error) from error


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config.json; numbers that are not finite become ``Infinity`` and ``NaN``, which transformers reads."""
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    free = 0
    for name, (dtype, shape) in layout.items():
        size = _tensor_size(dtype, shape)
        if not shards or size > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
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
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and path.exists():
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
