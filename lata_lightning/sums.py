"""The pass over the weights: the three sums of each tensor.

Subtraction happens at the precision the weights are held in (never below float32), products and sums in float64, chunk by chunk, so that no
temporary of the size of a tensor is made. Of a difference held as factors (LoRA) the sums come from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, first_three
from lata_lightning.low_rank import LowRank
from lata_lightning.moments import Moments, Start, check_start

# Elements per chunk: on a CPU the float64 copies of a chunk stay in its cache, on an accelerator launches must not dominate.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 22


def difference(tuned: Tensor, start: Tensor) -> Tensor:
    """Tuned minus start, at the wider of their precisions and never below float32. Neither input changes."""
    wide = torch.promote_types(torch.promote_types(tuned.dtype, start.dtype), torch.float32)
    return tuned.to(wide) - start.to(wide)


def tensor_sums(
    vector: Tensor | LowRank, instruction: Tensor | LowRank | None = None, *, subtract: Tensor | None = None, start: Start = "instruct"
) -> Tensor:
    """The three sums of one tensor.

    Args:
        vector: Tuned minus start, of any shape and floating dtype, or its factors; or the tuned weights, when ``subtract`` is given.
        instruction: Instruct minus base, of the same shape, or its factors.
        subtract: The start weights, for a vector that does not exist yet.
        start: ``"base"`` if the vector started from the base model. Then it is the complex vector, and the task vector is what remains after
            the instruction vector is taken off.

    Returns:
        Float64 tensor of shape (3,) on the device of ``vector``: inner, task, instruction. No input changes. Where one side is given as
        factors, no dense matrix of it is made.

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
        return _factored_sums(vector, instruction, subtract, start)
    flat, device = vector.detach().reshape(-1), vector.device
    flat_instruction, flat_start = (None if tensor is None else tensor.detach().reshape(-1) for tensor in (instruction, subtract))
    chunk = min(_CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK, flat.numel())
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    # Float64 copies of one chunk of task and instruction, made once: new memory for each chunk costs as much as the sums.
    rows = torch.empty(2, chunk, dtype=torch.float64, device=device)
    for begin in range(0, flat.numel(), max(chunk, 1)):
        piece = slice(begin, begin + chunk)
        part = flat[piece] if flat_start is None else difference(flat[piece], flat_start[piece].to(device, non_blocking=True))
        task, direction = rows[0, : part.numel()], rows[1, : part.numel()]
        task.copy_(part)
        if flat_instruction is not None:
            direction.copy_(flat_instruction[piece], non_blocking=True)
            if start == "base":
                task.sub_(direction)
            sums[0] += torch.dot(task, direction)
            sums[2] += torch.dot(direction, direction)
        sums[1] += torch.dot(task, task)
    return sums


def _factored_sums(vector: Tensor | LowRank, instruction: Tensor | LowRank | None, subtract: Tensor | None, start: Start) -> Tensor:
    """The three sums where at least one side is given as factors."""
    if isinstance(vector, LowRank):
        task = vector.square()
    else:
        vector = vector if subtract is None else difference(vector, subtract.to(vector.device))
        task = tensor_sums(vector)[1]
    zero = torch.zeros_like(task)
    if instruction is None:
        return torch.stack([zero, task, zero])
    square = (instruction.square() if isinstance(instruction, LowRank) else tensor_sums(instruction)[1]).to(task.device)
    if isinstance(vector, LowRank):
        inner = vector.inner(instruction) if isinstance(instruction, LowRank) else vector.inner_dense(instruction)
    elif isinstance(instruction, LowRank):
        inner = instruction.inner_dense(vector).to(task.device)
    if start == "base":
        # Of the complex vector v and the instruction vector i: ‖v − i‖² and ⟨v − i, i⟩.
        inner, task = inner - square, (task - 2 * inner + square).clamp_min(0.0)
    return torch.stack([inner, task, square])


def moments_table(sums: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Measured sums as numbers, by tensor name.

    Raises:
        CorruptFileError: Sums that are not finite: the weights hold NaN or infinite values.
    """
    if not sums:
        return {}
    rows = torch.stack(list(sums.values())).tolist()
    table = {name: Moments(*row) for name, row in zip(sums, rows, strict=True)}
    broken = [name for name, found in table.items() if not math.isfinite(found.inner + found.task + found.instruction)]
    if broken:
        raise CorruptFileError(
            f"weights must be finite; NaN or infinite values in {first_three(broken)}. Look for the step at which training diverged."
        )
    return table
