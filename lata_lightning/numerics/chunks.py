"""Flattened tensors, given piece by piece, so that nothing of the size of a tensor has to be in memory."""

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
"""Entries per piece: few enough for memory not to count, and enough for Python's part of a piece not to count either."""
ChunkReader = Callable[[int, int], Tensor]
"""Gives the entries from one number to another of a flattened tensor, to be asked for in order; what it gives may be overwritten by the next
call."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def chunk_bounds(count: int) -> Iterator[tuple[int, int]]:
    """First and last entry (exclusive) of every piece of a tensor with so many entries."""
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)


def tensor_chunks(tensor: Tensor) -> ChunkReader:
    """The pieces of a tensor in memory."""
    flat = tensor.detach().reshape(-1)
    return lambda begin, end: flat[begin:end]


def zeros(dtype: torch.dtype) -> ChunkReader:
    """The pieces of a tensor that is zero."""
    return lambda begin, end: torch.zeros(end - begin, dtype=dtype)


def factor_chunks(factors: LowRank) -> ChunkReader:
    """The pieces of a tensor held as factors, float64."""
    left, right = factors.joined()
    # Whole blocks of rows are computed, on their own grid, so that no value depends on the pieces that are asked for.
    return streamed((left[first:last] @ right for first, last in factors.blocks()), math.prod(factors.shape))


def streamed(blocks: Iterable[Tensor], size: int) -> ChunkReader:
    """The pieces of a tensor that comes as blocks of any size, in order.

    Args:
        blocks: Each is asked for when it is needed. When the last entry has been given out, they are run to their end.
        size: Number of entries in all.
    """
    coming = iter(blocks)
    waiting: list[Tensor] = []

    def load(begin: int, end: int) -> Tensor:
        count = end - begin
        while sum(part.numel() for part in waiting) < count:
            waiting.append(next(coming).reshape(-1))
        joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        waiting[:] = [joined[count:]] if joined.numel() > count else []
        if end == size:
            deque(coming, maxlen=0)
        return joined[:count]

    return load


def in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> list[_Result]:
    """The result of some work on every item, in their order, by several threads; the first error ends it.

    Args:
        work: Independent for each item. Torch runs it on one thread, as small operations lose more by being shared out than they gain.
        items: What to work on.
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
    """The number of threads to use; by default one for each processor this process may run on, up to four.

    Raises:
        LataError: The number is less than 1.
    """
    if workers is None:
        # More wait for the disk and for the interpreter's lock.
        return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 1:
        raise LataError(f"the number of workers must be at least 1, got {workers}")
    return workers


class MemoryLimit:
    """Lets threads work at the same time as long as what they need fits together into some memory.

    Args:
        limit: Bytes. Whoever needs more waits until nobody else works.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._free = limit, 0, threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until so many bytes are free, and take them."""
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
