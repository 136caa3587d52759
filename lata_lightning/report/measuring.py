"""Measuring several vectors and their inner products in one pass over their files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.moments import Moments, total
from lata_lightning.numerics.measure import moments_table, tensor_sums
from lata_lightning.store.mismatches import check_same_tensors
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.aligning import check_matching_instruction
from lata_lightning.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class PairwiseMoments:
    """Moments of every vector, and inner products of all pairs.

    Attributes:
        tables: Moments by tensor name, for each vector.
        pairs: Inner product by tensor name, for each pair of numbers of vectors, the smaller first.
    """

    tables: tuple[Mapping[str, Moments], ...]
    pairs: Mapping[tuple[int, int], Mapping[str, float]]

    def cosine(self, one: int, other: int, names: Iterable[str]) -> float | None:
        """Return the cosine of two vectors over some tensors, in [-1, 1]; None where one of them is zero."""
        names = list(names)
        first, second = (total(self.tables[index][name] for name in names) for index in (one, other))
        if first.task == 0 or second.task == 0:
            return None
        inner = math.fsum(self.pairs[min(one, other), max(one, other)][name] for name in names) if one != other else first.task
        return max(-1.0, min(1.0, inner / math.sqrt(first.task) / math.sqrt(second.task)))


def measure_together(
    vectors: Sequence[TaskVector], instruction: TaskVector | None = None, *, check_base: bool = True, progress: Progress | None = None
) -> PairwiseMoments:
    """Measure the moments of each vector with the instruction vector, and the inner products of all pairs, one tensor at a time.

    Args:
        vectors: Task vectors or instruction vectors. From one that started from base the instruction vector is subtracted first.
        instruction: Instruct minus base; without it the moments hold the norms of the task vectors only.
        check_base: Refuse an instruction vector that is known to belong to other weights.
        progress: Called after each tensor with the bytes read so far and in all, counted as float32.

    Returns:
        Sums in float64. No vector changes.

    Raises:
        LayoutMismatchError: The vectors do not have the same tensors in the same blocks.
        BaseMismatchError: The instruction vector belongs to other weights.
        LataError: A vector started from base and there is no instruction vector.
        CorruptFileError: Weights are NaN or infinite.
    """
    for vector in vectors:
        _check(vector, vectors[0], instruction, check_base)
    tasks = [
        vector.without(instruction) if instruction is not None and vector.manifest.kind == "task" and vector.start == "base" else vector
        for vector in vectors
    ]
    tables: list[dict[str, Moments]] = [{} for _ in tasks]
    pairs: dict[tuple[int, int], dict[str, float]] = {pair: {} for pair in combinations(range(len(tasks)), 2)}
    sizes = {name: 4 * len(vectors) * math.prod(vectors[0].shape(name)) for name in vectors[0]} if vectors else {}
    done, size = 0, sum(sizes.values())
    for name in sizes:
        differences = [task.factors_or_dense(name) for task in tasks]
        direction = None if instruction is None else instruction.factors_or_dense(name)
        for table, vector, task in zip(tables, vectors, differences, strict=True):
            along = None if vector.manifest.kind == "instruction" else direction
            table |= moments_table({name: tensor_sums(task, along)})
        for one, other in pairs:
            pairs[one, other] |= {name: tensor_sums(differences[one], differences[other])[0].item()}
        done += sizes[name]
        if progress is not None:
            progress(done, size)
    return PairwiseMoments(tuple(tables), pairs)


def _check(vector: TaskVector, first: TaskVector, instruction: TaskVector | None, check_base: bool) -> None:
    check_same_tensors(vector.tensors, first.tensors)
    if vector.layers.blocks != first.layers.blocks or any(vector.layers.positions[name] != first.layers.positions[name] for name in first):
        raise LayoutMismatchError(f"{vector.label} and {first.label} must have the same blocks to be shown together; make a report of each")
    if vector.manifest.kind == "instruction":
        return
    if instruction is not None:
        check_same_tensors(vector.tensors, instruction.tensors)
        if check_base:
            check_matching_instruction(vector, instruction, vector.start)
    elif vector.start == "base":
        raise LataError(
            f"{vector.label} started from base, so it contains the instruction vector: give --instruction VECTOR to measure its task vector"
        )
