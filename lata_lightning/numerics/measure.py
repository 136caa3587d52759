"""The measuring pass over the weights: the three sums of each tensor.

Subtraction happens at the precision of the weights, but at least float32. Products and sums are float64, chunk by chunk, so that no temporary copy of a
whole tensor is made. The sums of a difference that is stored as low-rank factors (LoRA) come from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, first_three
from lata_lightning.moments import Moments, Start, check_start
from lata_lightning.numerics.chunks import ChunkReader, tensor_chunks
from lata_lightning.numerics.kernels import sums as entry_sums
from lata_lightning.numerics.low_rank import LowRank

# Entries per chunk: on a CPU a chunk that was just read stays in the cache, on an accelerator kernel launches must not dominate.
_CPU_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 22
# The integer dtype of the same width, and the bits of infinity as such an integer.
_INFINITE = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


def difference(tuned: Tensor, start: Tensor) -> Tensor:
    """Return tuned minus start, at the wider of their precisions and at least float32. Neither input changes."""
    wide = torch.promote_types(torch.promote_types(tuned.dtype, start.dtype), torch.float32)
    return tuned.to(wide) - start.to(wide)


def tensor_sums(
    vector: Tensor | LowRank,
    instruction: Tensor | LowRank | None = None,
    *,
    subtract: Tensor | None = None,
    start: Start = "instruct",
    instruction_squared: float | None = None,
) -> Tensor:
    """Return the three sums of one tensor.

    Args:
        vector: Tuned minus start, of any shape and floating dtype, or its factors; the tuned weights when ``subtract`` is given.
        instruction: Instruct minus base, of the same shape, or its factors.
        subtract: The start weights, to be subtracted from ``vector``.
        start: ``"base"`` if the fine-tune started from the base model. Then ``vector`` is the complex vector, and the instruction vector is
            subtracted from it to get the task vector.
        instruction_squared: The last of the sums, if it is known already: it does not change while a model trains.

    Returns:
        Float64 tensor of shape (3,) on the device of ``vector``: inner, task, instruction. No input changes. A side given as factors is never made
        dense.

    Raises:
        LayoutMismatchError: The shapes differ.
        LataError: ``start`` is unknown, or ``"base"`` without an instruction vector.
    """
    check_start(start)
    if start == "base" and instruction is None:
        raise LataError("a vector that started from base needs the instruction vector: without it there is no task vector to measure")
    for other in (instruction, subtract):
        if other is not None and tuple(other.shape) != tuple(vector.shape):
            raise LayoutMismatchError(f"tensors of one name must have one shape, got {tuple(vector.shape)} and {tuple(other.shape)}")
    if isinstance(vector, LowRank) or isinstance(instruction, LowRank):
        return _factored_sums(vector, instruction, subtract, start, instruction_squared)
    if vector.device.type != "cpu":
        return _device_sums(vector, instruction, subtract, start)
    direction, origin = (None if tensor is None else tensor_chunks(tensor.cpu()) for tensor in (instruction, subtract))
    sums = streamed_sums(vector.numel(), tensor_chunks(vector), direction, subtract=origin, start=start)
    if instruction is not None and instruction_squared is not None:
        sums[2] = instruction_squared
    return sums


def streamed_sums(
    count: int,
    vector: ChunkReader,
    instruction: ChunkReader | None = None,
    *,
    subtract: ChunkReader | None = None,
    start: Start = "instruct",
) -> Tensor:
    """Return the three sums of a tensor on the CPU that is read chunk by chunk; as ``tensor_sums``.

    Args:
        count: Number of its entries.
        vector: Reader of the vector.
        instruction: Reader of the instruction vector.
        subtract: Reader of the start weights, where ``vector`` reads tuned ones.
        start: As for ``tensor_sums``.
    """
    chunks = []
    for begin in range(0, count, _CPU_CHUNK):
        end = min(begin + _CPU_CHUNK, count)
        task, origin, direction = vector(begin, end), None, None
        if subtract is not None:
            origin = subtract(begin, end)
            if task.dtype != origin.dtype:
                task, origin = difference(task, origin), None
        if instruction is not None:
            direction = _array(instruction(begin, end))
        chunks.append(entry_sums(_array(task), None if origin is None else _array(origin), direction, start == "base"))
    sums = [math.fsum(column) for column in zip(*chunks, strict=True)] if chunks else [0.0, 0.0, 0.0]
    return torch.tensor(sums, dtype=torch.float64)


def factored_sums(vector: LowRank | ChunkReader, instruction: LowRank | ChunkReader, *, start: Start = "instruct") -> Tensor:
    """Return the three sums of a tensor of which at least one side is given as factors; as ``tensor_sums``, on the CPU.

    A dense side is read chunk by chunk, each entry once.
    """
    if isinstance(vector, LowRank) and isinstance(instruction, LowRank):
        return tensor_sums(vector, instruction, start=start)
    if isinstance(vector, LowRank):
        task = vector.square().cpu()
        inner, square = vector.inner_and_square(instruction)  # type: ignore[arg-type]
    elif isinstance(instruction, LowRank):
        square = instruction.square().cpu()
        inner, task = instruction.inner_and_square(vector)
    else:
        raise TypeError("one side must be given as factors")
    return _from_start(inner, task, square, start)


def all_finite(values: Tensor) -> bool:
    """Return whether a contiguous floating tensor on the CPU holds neither NaN nor infinite values."""
    integers, infinite = _INFINITE[values.dtype]
    bits = values.reshape(-1).view(integers).numpy()
    # As integers, the magnitudes of NaN and of infinity are the largest.
    return bits.size == 0 or int(np.bitwise_and(bits, np.iinfo(bits.dtype).max).max()) < infinite


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one dtype and shape hold the same numbers, infinite and NaN ones included."""
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # NaN equals nothing, but a NaN with the same bits has not changed.
    return torch.equal(one, other) or torch.equal(*(side.reshape(-1).view(torch.uint8) for side in (one, other)))


def same_entries(one: Tensor, other: Tensor) -> Tensor:
    """Return a mask of the entries at which two tensors of one shape hold the same number; NaN counts as the same as NaN."""
    return (one == other) | (one.isnan() & other.isnan())


def _array(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).numpy()


def _device_sums(vector: Tensor, instruction: Tensor | None, subtract: Tensor | None, start: Start) -> Tensor:
    """Return the three sums of a vector on an accelerator; the other sides are copied there chunk by chunk."""
    flat, device = vector.detach().reshape(-1), vector.device
    flat_instruction, flat_start = (None if tensor is None else tensor.detach().reshape(-1) for tensor in (instruction, subtract))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for begin in range(0, flat.numel(), _DEVICE_CHUNK):
        chunk = slice(begin, begin + _DEVICE_CHUNK)
        task = flat[chunk] if flat_start is None else difference(flat[chunk], flat_start[chunk].to(device, non_blocking=True))
        task = task.double()
        if flat_instruction is not None:
            direction = flat_instruction[chunk].to(device, non_blocking=True).double()
            if start == "base":
                task = task - direction
            sums[0] += torch.dot(task, direction)
            sums[2] += torch.dot(direction, direction)
        sums[1] += torch.dot(task, task)
    return sums


def _factored_sums(
    vector: Tensor | LowRank, instruction: Tensor | LowRank | None, subtract: Tensor | None, start: Start, known: float | None
) -> Tensor:
    """Return the three sums where at least one side is given as factors."""
    if isinstance(vector, LowRank):
        task = vector.square()
    else:
        vector = vector if subtract is None else difference(vector, subtract.to(vector.device))
        task = tensor_sums(vector)[1]
    zero = torch.zeros_like(task)
    if instruction is None:
        return torch.stack([zero, task, zero])
    if known is not None:
        square = torch.tensor(known, dtype=torch.float64, device=task.device)
    else:
        square = (instruction.square() if isinstance(instruction, LowRank) else tensor_sums(instruction)[1]).to(task.device)
    if isinstance(vector, LowRank):
        inner = vector.inner(instruction) if isinstance(instruction, LowRank) else vector.inner_dense(instruction)
    elif isinstance(instruction, LowRank):
        inner = instruction.inner_dense(vector).to(task.device)
    return _from_start(inner, task, square, start)


def _from_start(inner: Tensor, task: Tensor, square: Tensor, start: Start) -> Tensor:
    """Return the three sums of the task vector, from those of the vector as given."""
    if start == "base":
        # Of the complex vector v and the instruction vector i: ‖v − i‖² and ⟨v − i, i⟩.
        inner, task = inner - square, (task - 2 * inner + square).clamp_min(0.0)
    return torch.stack([inner, task, square])


def moments_table(sums: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Return measured sums as numbers, by tensor name.

    Raises:
        CorruptFileError: A sum is not finite, because the weights hold NaN or infinite values.
    """
    if not sums:
        return {}
    rows = torch.stack(list(sums.values())).tolist()
    table = {name: Moments(*row) for name, row in zip(sums, rows, strict=True)}
    broken = [name for name, moments in table.items() if not math.isfinite(moments.inner + moments.task + moments.instruction)]
    if broken:
        raise CorruptFileError(
            f"weights must be finite; NaN or infinite values in {first_three(broken)}. Look for the step at which training diverged."
        )
    return table
