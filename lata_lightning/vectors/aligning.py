"""Measuring task vectors against an instruction vector, and whether vectors belong to the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lata_lightning.alignment import Alignment, alignment_of
from lata_lightning.errors import BaseMismatchError
from lata_lightning.layers import Level, check_level
from lata_lightning.moments import Moments, Start, check_start
from lata_lightning.numerics.chunks import in_parallel, worker_count
from lata_lightning.numerics.measure import factored_sums, moments_table, streamed_sums
from lata_lightning.store.meaning import check_all_mean_the_same, check_same_meaning, meaning_of
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.pairing import brought_to
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import View
from lata_lightning.vectors.task_vector import TaskVector


def measure(task_vector: TaskVector, instruction_vector: TaskVector, start: Start = "instruct") -> dict[str, Moments]:
    """Return the moments by tensor name; several threads read the tensors chunk by chunk.

    Raises:
        LayoutMismatchError: A tensor is on one side only, or has two shapes; or the models have different tokens or compute different functions.
        CorruptFileError: NaN or infinite weights.
    """
    instruction = weights_along(task_vector, instruction_vector)
    check_same_meaning((task_vector.label, task_vector.manifest.meaning), (instruction_vector.label, instruction_vector.manifest.meaning))

    def sums_of(name: str) -> Tensor:
        task, direction = task_vector.low_rank(name), instruction.low_rank(name)
        if task is not None or direction is not None:
            return factored_sums(task or task_vector.tensors.chunks(name), direction or instruction.chunks(name), start=start)
        sides = task_vector.tensors.chunks(name), instruction.chunks(name)
        return streamed_sums(math.prod(task_vector.shape(name)), *sides, start=start)

    parallel = task_vector.tensors.parallel and instruction_vector.tensors.parallel
    names = list(instruction.names)
    return moments_table(dict(zip(names, in_parallel(sums_of, names, worker_count(None) if parallel else 1), strict=True)))


def weights_along(task_vector: TaskVector, instruction_vector: TaskVector) -> View:
    """Return the weights of an instruction vector under the names of a task vector; buffers are left out of both.

    Raises:
        LayoutMismatchError: A weight is on one side only, and was not left out of the task vector; or has two shapes.
    """
    buffers = task_vector.layers.statistics
    weights = View(task_vector.tensors, {name: name for name in task_vector if name not in buffers})
    others = {name: name for name in instruction_vector if name not in instruction_vector.layers.statistics}
    # An instruction vector from before buffers were told apart from weights may have some.
    leave_out = LeaveOut(task_vector.manifest.leave_out, buffers)
    return brought_to(weights, View(instruction_vector.tensors, others), leave_out)


def align(
    task_vector: TaskVector,
    instruction_vector: TaskVector,
    level: Level = "block",
    start: Start | None = None,
    *,
    check_base: bool = True,
) -> Alignment:
    """Return the alignment of a task vector with an instruction vector, layer by layer.

    Args:
        task_vector: Tuned minus start.
        instruction_vector: Instruct minus base.
        level: The unit of weighting.
        start: What the fine-tune started from; by default what the task vector's manifest says.
        check_base: Refuse an instruction vector that is known to belong to other weights.

    Returns:
        The alignment, without coefficients (see ``lata_lightning.weighting``). Neither vector changes.

    Raises:
        LayoutMismatchError: The vectors do not have the same tensors.
        BaseMismatchError: The instruction vector belongs to other weights.
        CorruptFileError: NaN or infinite weights.

    Source: LATA, arXiv:2502.20186, step 2.
    """
    check_level(level)
    start = check_start(start or task_vector.start)
    if check_base:
        check_matching_instruction(task_vector, instruction_vector, start)
    return alignment_of(measure(task_vector, instruction_vector, start), task_vector.layers, level, start)


def check_same_model(model: TensorSource, vectors: Sequence[TaskVector], *, by_token: bool = True) -> None:
    """Refuse vectors whose models have other tokens, or compute another function, than the weights they are used with; what is unknown passes.

    Args:
        model: The weights.
        vectors: They are compared with the weights and with each other.
        by_token: Whether to compare tokenizers.

    Raises:
        LayoutMismatchError: The configs differ in a key that changes what the weights compute, or a row is a different token in each.
    """
    check_all_mean_the_same(
        [(model.label, meaning_of(model)), *((vector.label, vector.manifest.meaning) for vector in vectors)], by_token=by_token
    )


def check_same_start(vectors: Sequence[TaskVector]) -> None:
    """Refuse vectors that are known to start from different weights; unknown starts pass."""
    seen: dict[frozenset[str], TaskVector] = {}
    for vector in vectors:
        origin = vector.manifest.start_identity.content_hash
        # Hashes of different sets of tensors, as where a head was left out of one, cannot be compared.
        first = seen.setdefault(frozenset(vector), vector) if origin else vector
        if first.manifest.start_identity.content_hash == origin:
            continue
        one, other = first, vector
        raise BaseMismatchError(
            f"{one.label} started from {one.manifest.start_identity.location} and {other.label} from {other.manifest.start_identity.location}, which "
            "are different weights, so their sum has no common origin. Extract them from one start, or switch the check off (check_base=False, "
            "--check-base false)."
        )


def check_matching_instruction(task_vector: TaskVector, instruction_vector: TaskVector, start: Start) -> None:
    """Refuse an instruction vector that is known to belong to other weights than the start of the task vector; unknown weights pass."""
    sides = instruction_vector.manifest
    expected = sides.tuned_identity if start == "instruct" else sides.start_identity
    origin = task_vector.manifest.start_identity
    # Hashes of different sets of tensors, as where a head was left out of one, cannot be compared.
    comparable = origin.content_hash and expected.content_hash and set(task_vector) == set(instruction_vector)
    if comparable and origin.content_hash != expected.content_hash:
        raise BaseMismatchError(
            f"{task_vector.label} started from {origin.location}, and the {start} model of {instruction_vector.label} is {expected.location}: these are "
            f"different weights. If the fine-tune started from {'base' if start == 'instruct' else 'instruct'}, say so (start=…, --start); otherwise "
            "extract the instruction vector from the models it belongs to, or switch the check off (check_base=False, --check-base false)."
        )
