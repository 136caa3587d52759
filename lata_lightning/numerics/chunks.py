"""Flattened tensors read chunk by chunk, so that no whole tensor has to be in memory."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.numerics.low_rank import LowRank

CHUNK = 1 << 18
"""Entries per chunk: few enough to need little memory, many enough to make Python's overhead per chunk negligible."""
ChunkReader = Callable[[int, int], Tensor]
"""Returns the entries [begin, end) of a flattened tensor. Ranges are asked for in order; the next call may overwrite what the last one returned."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def chunk_bounds(count: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last entry (exclusive) of every chunk of a tensor with ``count`` entries."""
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)


def tensor_chunks(tensor: Tensor) -> ChunkReader:
    """Return a reader of a tensor in memory."""
    flat = tensor.detach().reshape(-1)
    return lambda begin, end: flat[begin:end]


def zeros(dtype: torch.dtype) -> ChunkReader:
    """Return a reader of a tensor of zeros."""
    return lambda begin, end: torch.zeros(end - begin, dtype=dtype)


def factor_chunks(factors: LowRank) -> ChunkReader:
    """Return a reader, in float64, of a tensor given as low-rank factors."""
    left, right = factors.joined()
    # Whole blocks of rows are computed, on a fixed grid, so that no value depends on which chunks are asked for.
    return streamed((left[first:last] @ right for first, last in factors.blocks()), math.prod(factors.shape))


def streamed(blocks: Iterable[Tensor], size: int) -> ChunkReader:
    """Return a reader of a tensor that arrives as blocks of any size, in order.

    Args:
        blocks: Each is computed when it is needed. After the last entry has been read, the iterable is run to its end.
        size: Number of entries of the tensor.
    """
    coming = iter(blocks)
    waiting: list[Tensor] = []
    first = 0

    def load(begin: int, end: int) -> Tensor:
        nonlocal first
        if begin < first:
            raise ValueError(f"entries of a stream come in order; those from {begin} on were asked for after those before {first}")
        while first + sum(part.numel() for part in waiting) < end:
            waiting.append(next(coming).reshape(-1))
            while waiting and first + waiting[0].numel() <= begin:
                first += waiting.pop(0).numel()
        joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        waiting[:] = [joined[end - first :]] if joined.numel() > end - first else []
        first, skipped = end, begin - first
        if end == size:
            deque(coming, maxlen=0)
        return joined[skipped : skipped + end - begin]

    return load


def in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> list[_Result]:
    """Run a function on every item in several threads and return the results in order; the first error stops the rest.

    Args:
        work: Independent for each item. Torch uses one thread within it, as splitting small operations costs more than it saves.
        items: Arguments of ``work``.
        workers: Number of threads.
    """
    with _one_torch_thread():
        if workers == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def worker_count(workers: int | None) -> int:
    """Return the number of threads to use; by default one for each processor available to this process, up to four.

    Raises:
        LataError: The number is less than 1.
    """
    if workers is None:
        # More threads only wait for the disk and the interpreter's lock.
        return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 1:
        raise LataError(f"the number of workers must be at least 1, got {workers}")
    return workers


class MemoryLimit:
    """A limit on the memory that threads use together; a thread that would exceed it waits.

    Args:
        limit: Bytes. A thread that needs more than this runs alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._free = limit, 0, threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until ``count`` bytes are free, and reserve them for the ``with`` block."""
        count = min(count, self._limit)
        with self._free:
            self._free.wait_for(lambda: self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._free:
                self._used -= count
                self._free.notify_all()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
