"""The innermost loops, compiled by numba: each entry goes through all steps while it is in the processor's cache.

The compiled code is cached on disk, beside this file or, where that directory is read-only, in the user's cache, so that only the first use on a
machine waits for the compiler. Where neither can be written, every process compiles anew. The loops release the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

# Entries that go through all steps together: their buffers fit into the first-level cache.
_BLOCK = 512
_SUMMED = 4096
# The bits of a float64 that a float32 drops, and the bits of its absolute value.
_CUT = np.uint64((1 << 29) - 1)
_MAGNITUDE = np.uint64((1 << 63) - 1)
_ONE = np.uint64(1)
# The smallest normal float32, as bits of a float64, less one.
_SMALLEST = np.uint64(np.float64(2.0**-126).view(np.uint64) - _ONE)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function when it is first called, and caches the result on disk where a directory can be written.

    Args:
        options: More options of ``numba.njit``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:
            # numba raises this when it can write to none of its cache directories.
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


@compiled()
def combine(weights: Array, vectors: Array, less: Array, factors: Array, result: Array, odd: bool) -> np.uint64:
    """Write weights + Σ factor · vector, or where ``less`` says so Σ factor · (vector − weights), summed in float64.

    Opposite terms cancel exactly: the vectors are summed before the weights are added, and each product is rounded before it is added. Weights to
    which nothing is added stay as they are, even -0.0.

    Args:
        weights: Float32 or float64, of shape (count,).
        vectors: Float32 or float64, of shape (number, count), contiguous.
        less: Boolean, of shape (number,): whether the weights are to be subtracted from the vector, in the dtype of both.
        factors: Float64, of shape (number,).
        result: Float32 or float64, of shape (count,); overwritten.
        odd: Round to odd, for which ``result`` must be float32: cut the sum to the bits of a float32, and set the last of them if anything was cut
            off. Rounding that to a narrower dtype gives what rounding the sum itself would.

    Returns:
        The largest magnitude of a sum, as the bits of a float64; those of infinity and NaN are larger than all others.
    """
    total = np.empty(_BLOCK)
    total_bits = total.view(np.uint64)
    cut = np.empty(_BLOCK, np.uint64)
    cut_values = cut.view(np.float64)
    nearest = np.empty(_BLOCK, np.float32)
    nearest_bits = nearest.view(np.uint32)
    largest = np.uint64(0)
    for begin in range(0, weights.size, _BLOCK):
        end = min(begin + _BLOCK, weights.size)
        values, bits, onto, out = total[: end - begin], total_bits[: end - begin], weights[begin:end], result[begin:end]
        values[:] = 0.0
        for number in range(factors.size):
            factor, vector = factors[number], vectors[number, begin:end]
            if less[number]:
                for index in range(values.size):
                    values[index] += np.float64(vector[index] - onto[index]) * factor
            else:
                for index in range(values.size):
                    values[index] += np.float64(vector[index]) * factor
        for index in range(values.size):
            start = np.float64(onto[index])
            values[index] = start if values[index] == 0.0 else values[index] + start
        for index in range(bits.size):
            largest = max(largest, bits[index] & _MAGNITUDE)
        if not odd:
            for index in range(values.size):
                out[index] = values[index]
            continue
        tiny = np.uint64(0)
        for index in range(bits.size):
            cut[index] = (((bits[index] & _CUT) + _CUT) | bits[index]) & ~_CUT
            # Zeros, less one, are larger than anything.
            tiny += np.uint64((bits[index] & _MAGNITUDE) - _ONE < _SMALLEST)
        for index in range(out.size):
            out[index] = cut_values[index]
        if tiny > 0:
            # Below its smallest normal number a float32 holds fewer bits.
            for index in range(values.size):
                nearest[index] = values[index]
                back = np.float64(nearest[index])
                if back != values[index]:
                    beyond = np.uint32(abs(back) > abs(values[index]))
                    nearest_bits[index] = (nearest_bits[index] - beyond) | np.uint32(1)
                out[index] = nearest[index]
    return largest


@compiled(fastmath={"reassoc", "contract"})
def sums(tuned: Array, start: Array | None, direction: Array | None, from_base: bool) -> tuple[float, float, float]:
    """Return the three sums of a chunk of a tensor, in float64: ⟨task, direction⟩, ‖task‖², ‖direction‖².

    Args:
        tuned: The vector, float32 or float64, flat; or the tuned weights, when ``start`` is given.
        start: Subtracted from ``tuned`` in the dtype of both.
        direction: The instruction vector; without it the first and last sums are 0.
        from_base: Whether to subtract the direction from the vector, in float64, to get the task vector.
    """
    inner = square = length = 0.0
    # Sums of blocks, and then the sum of those, so that fewer roundings accumulate.
    for begin in range(0, tuned.size, _SUMMED):
        end = min(begin + _SUMMED, tuned.size)
        vectors = tuned[begin:end]
        if start is not None:
            starts = start[begin:end]
        if direction is not None:
            directions = direction[begin:end]
        block_inner = block_square = block_length = 0.0
        for index in range(vectors.size):
            vector = vectors[index]
            if start is not None:
                vector = vector - starts[index]
            task = np.float64(vector)
            if direction is not None:
                along = np.float64(directions[index])
                if from_base:
                    task = task - along
                block_inner += task * along
                block_length += along * along
            block_square += task * task
        inner += block_inner
        square += block_square
        length += block_length
    return inner, square, length


@compiled(fastmath={"reassoc", "contract"})
def loss(full: Array, lower: Array) -> tuple[float, float, float, int, int]:
    """Return ⟨full, lower⟩, ‖full‖², ‖lower‖², the number of nonzero entries of ``full``, and how many of them are zero in ``lower``.

    Args:
        full: Flat values, float32 or float64.
        lower: The same values after storing them at a lower precision, float32 or float64.
    """
    inner = square = lower_square = 0.0
    nonzero = lost = 0
    for index in range(full.size):
        before, after = np.float64(full[index]), np.float64(lower[index])
        inner += before * after
        square += before * before
        lower_square += after * after
        nonzero += before != 0.0
        lost += (before != 0.0) & (after == 0.0)
    return inner, square, lower_square, nonzero, lost
