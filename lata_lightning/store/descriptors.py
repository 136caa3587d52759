"""Files opened for reading: a limited number at a time, with the true reason where one cannot be opened."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lata_lightning.errors import CorruptFileError, LataError, SourceError

MAX_OPEN = 32
"""Descriptors that are open at a time, by all sources of the process together."""
_AHEAD = 1 << 16


class FileIdentity(NamedTuple):
    """Which file was opened first, and in which state, so that a later change is noticed."""

    path: Path
    device: int
    number: int
    size: int
    changed: int


class Descriptors:
    """Descriptors of files that are read at offsets. When there are too many, the least recently used are closed. Threads may share them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Reentrant: while a thread opens a source, another one may be collected, which closes its files.
        self._lock = threading.RLock()
        # In the order of use, each with the number of its reads in progress.
        self._open: dict[FileIdentity, list[int]] = {}

    def identify(self, path: Path) -> FileIdentity:
        """Open a file and return which one it is.

        Raises:
            SourceError, CorruptFileError: It cannot be opened; the message says why.
        """
        with self._lock:
            descriptor = self.opened(path)
            identity = _identity(path, descriptor)
            if identity in self._open:
                os.close(descriptor)
            else:
                self._open[identity] = [descriptor, 0]
                self._close_oldest(self._limit)
        return identity

    @contextmanager
    def reading(self, file: FileIdentity) -> Iterator[int]:
        """Yield a descriptor of a file, which stays open inside the block.

        Raises:
            CorruptFileError: The path has another file by now.
            SourceError: It cannot be opened again.
        """
        with self._lock:
            entry = self._open.pop(file, None)
            if entry is None:
                descriptor = self.opened(file.path)
                if _identity(file.path, descriptor) != file:
                    os.close(descriptor)
                    raise CorruptFileError(f"{file.path} has changed since it was opened. Run the command again.")
                entry = [descriptor, 0]
            entry[1] += 1
            self._open[file] = entry
            self._close_oldest(self._limit)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def close(self, files: Iterable[FileIdentity]) -> None:
        """Close the descriptors of some files, except those that are being read; later reads open them again."""
        with self._lock:
            for file in files:
                self._close(file)

    def opened(self, path: Path) -> int:
        """Open a regular file and return its descriptor, which the caller closes; idle descriptors are closed where too many are open.

        Raises:
            SourceError, CorruptFileError: It cannot be opened; the message says why.
        """
        try:
            # Non-blocking, as opening a named pipe would wait.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            return descriptor
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                with self._lock:
                    closed = self._close_oldest(0)
                if closed:
                    return self.opened(path)
            raise unreadable(path, error) from error

    def _close_oldest(self, keep: int) -> bool:
        """Close idle descriptors until so many are left; return whether any was closed."""
        before = len(self._open)
        for file in list(self._open)[: max(0, before - keep)]:
            self._close(file)
        return len(self._open) < before

    def _close(self, file: FileIdentity) -> None:
        entry = self._open.get(file)
        if entry is not None and entry[1] == 0:
            os.close(entry[0])
            del self._open[file]


DESCRIPTORS = Descriptors(MAX_OPEN)


class Window:
    """A range of a file as a stream, to read archives and pickles inside a file."""

    def __init__(self, file: FileIdentity, begin: int, end: int) -> None:
        self._file, self._begin, self.size = file, begin, end - begin
        self._position = 0
        self._buffer, self._buffer_at = b"", 0

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes; all that are left for a negative size."""
        left = max(0, self.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        offset = self._position - self._buffer_at
        if not 0 <= offset <= len(self._buffer) - size:
            self._buffer, self._buffer_at, offset = self._bytes(self._position, max(size, min(left, _AHEAD))), self._position, 0
        self._position += size
        return self._buffer[offset : offset + size]

    def readline(self) -> bytes:
        """Return the bytes up to the next line break."""
        taken = bytearray()
        while byte := self.read(1):
            taken += byte
            if byte == b"\n":
                break
        return bytes(taken)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, counted from the beginning, from here or from the end, and return it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._position

    def seekable(self) -> bool:
        """Return True: positions can be set."""
        return True

    def _bytes(self, begin: int, size: int) -> bytes:
        data = bytearray(size)
        fill(memoryview(data), self._file, self._begin + begin)
        return bytes(data)


def fill(target: memoryview, file: FileIdentity, begin: int) -> None:
    """Read bytes of a file, from an offset on, until the target is full.

    Raises:
        CorruptFileError: The file ends before.
    """
    with DESCRIPTORS.reading(file) as descriptor:
        while target:
            try:
                count = os.preadv(descriptor, [target], begin)
            except OSError as error:
                raise unreadable(file.path, error) from error
            if count == 0:
                raise CorruptFileError(f"{file.path} has become shorter, or is cut off. Copy it again.")
            target, begin = target[count:], begin + count


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, fewer where it is shorter.

    Raises:
        SourceError, CorruptFileError: It cannot be opened; the message says why.
    """
    try:
        with os.fdopen(DESCRIPTORS.opened(path), "rb") as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> LataError:
    """Return the error that says why a file cannot be read, and what to do."""
    if isinstance(error, FileNotFoundError):
        return CorruptFileError(f"{path} is missing. Copy or download it again.")
    if isinstance(error, PermissionError):
        return SourceError(f"{path} may not be read by this user ({error.strerror}). Ask its owner for the right to read it.")
    if isinstance(error, IsADirectoryError):
        return SourceError(f"{path} is no file where one is expected, but a directory or a device")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return SourceError(f"too many files are open to open {path} as well. Raise the limit (ulimit -n) or close some.")
    return SourceError(f"{path} cannot be read: {error.strerror or error}")


def _identity(path: Path, descriptor: int) -> FileIdentity:
    status = os.fstat(descriptor)
    return FileIdentity(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
