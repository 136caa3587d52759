"""How far each layer of a fine-tune points along instruction following."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import BaseMismatchError, LayoutMismatchError, first_three
from lata_lightning.layers import LayerMap, Level, check_level
from lata_lightning.moments import Moments, Start, check_start, total

if TYPE_CHECKING:
    from torch import Tensor

    from lata_lightning.store.task_vector import TaskVector

FLAT_SPREAD = 0.05
"""Alignments that span less than this are too close to rank by: in experiments on small models spans of 0.02 to 0.1 gave ranks that did no
better than random ones."""


@dataclass(frozen=True)
class LayerStats:
    """What was measured of one layer; norms in the units of the weights.

    Attributes:
        alignment: cos(complex vector, instruction vector); None where it is undefined.
        relative_norm: ‖task vector‖ / ‖instruction vector‖; None where the instruction vector is zero.
        task_norm: ‖task vector‖.
        instruction_norm: ‖instruction vector‖.
        coefficient: The layer's weight; None as long as no weighting rule has been applied.
    """

    alignment: float | None
    relative_norm: float | None
    task_norm: float
    instruction_norm: float
    coefficient: float | None = None

    @classmethod
    def of(cls, moments: Moments) -> LayerStats:
        """The figures that follow from three sums."""
        return cls(moments.alignment, moments.relative_norm, moments.task_norm, moments.instruction_norm)


@dataclass(frozen=True)
class Alignment:
    """Alignment of every layer of one task vector with one instruction vector.

    Attributes:
        level: The unit: block, submodule or tensor.
        start: What the fine-tune started from.
        layers: The ranked layers, in the order in which the model runs them.
        outside: The tensors that belong to no layer, by tensor name.
    """

    level: Level
    start: Start
    layers: Mapping[str, LayerStats]
    outside: Mapping[str, LayerStats]

    @property
    def values(self) -> dict[str, float]:
        """Alignment by layer, where it is defined."""
        return {name: stats.alignment for name, stats in self.layers.items() if stats.alignment is not None}

    @property
    def undefined(self) -> list[str]:
        """Layers without an alignment, because the instruction vector (or the complex vector) is zero there."""
        return [name for name, stats in self.layers.items() if stats.alignment is None]

    @property
    def spread(self) -> float:
        """Largest minus smallest alignment; 0 with fewer than two layers."""
        found = self.values.values()
        return max(found) - min(found) if found else 0.0

    @property
    def flat(self) -> bool:
        """Whether the alignments spread too little to rank by (see FLAT_SPREAD)."""
        return len(self.values) > 1 and self.spread < FLAT_SPREAD

    def with_coefficients(self, coefficients: Mapping[str, float] | None, outside: float = 0.0) -> Alignment:
        """The same measurement with coefficients written in: by layer, and one for all tensors outside."""
        layers = {
            name: replace(stats, coefficient=None if coefficients is None else coefficients[name]) for name, stats in self.layers.items()
        }
        rest = {name: replace(stats, coefficient=None if coefficients is None else outside) for name, stats in self.outside.items()}
        return replace(self, layers=layers, outside=rest)

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON; an undefined alignment is null."""
        return {
            "level": self.level,
            "start": self.start,
            "layers": {name: asdict(stats) for name, stats in self.layers.items()},
            "outside": {name: asdict(stats) for name, stats in self.outside.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Alignment:
        """The inverse of ``to_json``."""
        layers, outside = ({name: LayerStats(**stats) for name, stats in data[key].items()} for key in ("layers", "outside"))
        return cls(data["level"], data["start"], layers, outside)


def alignment_of(table: Mapping[str, Moments], layers: LayerMap, level: Level = "block", start: Start = "instruct") -> Alignment:
    """Alignment by layer from a table of moments by tensor."""
    grouped = {layer: total(table[name] for name in names) for layer, names in layers.layers(level).items()}
    return Alignment(
        level=level,
        start=check_start(start),
        layers={layer: LayerStats.of(moments) for layer, moments in grouped.items()},
        outside={name: LayerStats.of(table[name]) for name in layers.outside()},
    )


def layer_alignment(table: Mapping[str, Moments]) -> dict[str, float]:
    """Cosine between complex vector and instruction vector, one value per layer.

    Args:
        table: Moments by layer.

    Returns:
        Dimensionless, in [-1, 1], by layer name; absent where the instruction vector is zero.

    Source: LATA, arXiv:2502.20186, step 2.
    """
    return {layer: moments.alignment for layer, moments in table.items() if moments.alignment is not None}


def measure(task_vector: TaskVector, instruction_vector: TaskVector, start: Start = "instruct") -> dict[str, Moments]:
    """Moments by tensor name; the tensors are read piece by piece, by several threads.

    Raises:
        LayoutMismatchError: A tensor is on one side only, or has two shapes.
        CorruptFileError: NaN or infinite weights.
    """
    # What reads a stored alignment needs no torch, which takes a second to import.
    from lata_lightning.pieces import in_parallel, worker_count
    from lata_lightning.sums import moments_table, streamed_sums, tensor_sums

    check_same_tensors(task_vector, instruction_vector)

    def sums_of(name: str) -> Tensor:
        if task_vector.low_rank(name) is not None or instruction_vector.low_rank(name) is not None:
            return tensor_sums(task_vector.held(name), instruction_vector.held(name), start=start)
        sides = task_vector.tensors.load(name), instruction_vector.tensors.load(name)
        return streamed_sums(math.prod(task_vector.shape(name)), *sides, start=start)

    parallel = task_vector.tensors.parallel and instruction_vector.tensors.parallel
    names = list(task_vector)
    return moments_table(dict(zip(names, in_parallel(sums_of, names, worker_count(None) if parallel else 1), strict=True)))


def align(
    task_vector: TaskVector,
    instruction_vector: TaskVector,
    level: Level = "block",
    start: Start | None = None,
    *,
    check_base: bool = True,
) -> Alignment:
    """Alignment of a task vector with an instruction vector, layer by layer.

    Args:
        task_vector: Tuned minus start.
        instruction_vector: Instruct minus base.
        level: The unit of weighting.
        start: What the fine-tune started from; by default what the task vector's manifest says.
        check_base: Refuse an instruction vector that is known to belong to other weights.

    Returns:
        The alignment, without coefficients (see ``lata_lightning.weighting``). Neither vector changes.

    Raises:
        LayoutMismatchError: The vectors do not hold the same tensors.
        BaseMismatchError: The instruction vector belongs to other weights.
        CorruptFileError: NaN or infinite weights.

    Source: LATA, arXiv:2502.20186, step 2.
    """
    check_level(level)
    start = check_start(start or task_vector.start)
    if check_base:
        check_matching_instruction(task_vector, instruction_vector, start)
    return alignment_of(measure(task_vector, instruction_vector, start), task_vector.layers, level, start)


def check_same_tensors(one: TaskVector, other: TaskVector) -> None:
    """Refuse two vectors that differ in names or shapes; the message names the first three tensors."""
    lone = set(one) ^ set(other)
    if lone:
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must hold the same tensors; on one side only are {first_three(lone)}. Were both made from one base model?"
        )
    odd = {name for name in one if one.shape(name) != other.shape(name)}
    if odd:
        name = min(odd)
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must have the same shapes; different are {first_three(odd)}, {name} with {one.shape(name)} and "
            f"{other.shape(name)}. Do both have the same vocabulary and sizes?"
        )


def check_same_start(vectors: Sequence[TaskVector]) -> None:
    """Refuse vectors that are known to start from different weights; unknown starts pass."""
    known = {vector.manifest.start_identity.content_hash: vector for vector in vectors if vector.manifest.start_identity.content_hash}
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise BaseMismatchError(
            f"{one.label} started from {one.manifest.start_identity.location} and {other.label} from {other.manifest.start_identity.location}, which "
            "are different weights, so their sum has no common origin. Extract them from one start, or switch the check off (check_base=False, "
            "--check-base false)."
        )


def check_matching_instruction(task_vector: TaskVector, instruction_vector: TaskVector, start: Start) -> None:
    """Refuse an instruction vector that is known to belong to other weights than the task vector's start; unknown ones pass."""
    sides = instruction_vector.manifest
    expected = sides.tuned_identity if start == "instruct" else sides.start_identity
    origin = task_vector.manifest.start_identity
    if origin.content_hash and expected.content_hash and origin.content_hash != expected.content_hash:
        raise BaseMismatchError(
            f"{task_vector.label} started from {origin.location}, and the {start} model of {instruction_vector.label} is {expected.location}: these are "
            f"different weights. If the fine-tune started from {'base' if start == 'instruct' else 'instruct'}, say so (start=…, --start); otherwise "
            "extract the instruction vector from the models it belongs to, or switch the check off (check_base=False, --check-base false)."
        )
