"""How far a module is from linear along a task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.layers import Level
from lata_lightning.linearity.positions import few_positions
from lata_lightning.linearity.start import StartModel
from lata_lightning.linearity.walk import Batch, Passage, Walker
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.task_vector import TaskVector

Distance = Callable[[Tensor, Tensor], Tensor]
"""From two sets of features, both (positions, width), to a distance per position, (positions,)."""
DistanceName = Literal["l2", "cosine"]
DISTANCES: tuple[DistanceName, ...] = get_args(DistanceName)

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Boole's rule, whose nodes are exact in binary, so that a linear module scores an exact zero where its arithmetic is exact.
_WEIGHTS = (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90)
MODEL = "model"


def l2_distance(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean distance by position."""
    distance: Tensor = torch.linalg.vector_norm(one - other, dim=-1)
    return distance


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """One minus the cosine, by position."""
    return 1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)


def nonlinearity(features: Callable[[float], Tensor], distance: Distance = l2_distance) -> Tensor:
    """Non-linearity score of a module, by position.

    NLS = ∫₀¹∫₀¹ [ D(f(a), f(b)) / D(f(1), f(0)) − ``|a − b|`` ]² da db, with f(s) what the module gives out at start + s · vector. The integral is
    taken over the five scales 0, ¼, ½, ¾ and 1 in each direction by Boole's rule: exact for changes that are quadratic in s,
    two percent off for exponential ones.

    Args:
        features: f, from a scale to features of shape (positions, width). It is called once for each of the five scales.
        distance: D.

    Returns:
        Dimensionless, at least 0, of shape (positions,), float64; 0 for a module that is linear along the vector, with the Euclidean distance. NaN
        at positions whose features the vector does not change.

    Source: submodule linearity, arXiv:2504.10902, non-linearity score.
    """
    at = [features(scale) for scale in SCALES]
    # Where this is 0 the score is NaN, from 0 / 0 at the two ends.
    whole = distance(at[-1], at[0]).double()
    score = torch.zeros_like(whole)
    for first, second in combinations(range(len(SCALES)), 2):
        ratio = distance(at[second], at[first]).double() / whole
        # Twice, as (b, a) is not gone through; where a = b the integrand is 0.
        score += 2 * _WEIGHTS[first] * _WEIGHTS[second] * (ratio - (SCALES[second] - SCALES[first])) ** 2
    return score


@dataclass(frozen=True)
class Score:
    """Non-linearity of one module along one task vector; mean over the positions that the vector changes, None where there is none.

    Attributes:
        layer: Name of the layer; ``model`` for the whole model.
        part: ``model``, ``block``, ``attention``, ``cross_attention`` or ``mlp``.
        depth: Number of the block; None for the whole model.
        branch: Of what the module adds: its output before it is added to what came in. None where that cannot be told apart: for the whole model, for
            a part that is no module of its own, and for a block that changes the shape.
        output: Of the output of the block (or model) while only this module's weights move.
    """

    layer: str
    part: str
    depth: int | None
    branch: float | None
    output: float | None


@dataclass(frozen=True)
class Linearity:
    """Scores of one task vector: the whole model first, then the blocks in order, each before its parts."""

    vector: str
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


class _Mean:
    """Mean over positions, without those where nothing is defined."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: Tensor) -> None:
        defined = values[~values.isnan()]
        self._sum += defined.sum().item()
        self._count += len(defined)

    @property
    def value(self) -> float | None:
        return self._sum / self._count if self._count else None


def measure_linearity(
    start: StartModel,
    vectors: Sequence[TaskVector],
    samples: Sequence[Sequence[Batch]],
    *,
    level: Level = "submodule",
    distance: Distance = l2_distance,
    check_base: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Linearity]:
    """Non-linearity scores of the whole model, of each block and of its parts, along each task vector.

    A module gets the hidden states of the start model, whatever its own weights; the whole model gets the samples. The model runs block by block as in
    ``solve_coefficients``, five times for each vector.

    Args:
        start: Directory or hub id of a transformers model, or a module. Dropout is off, and it does not change.
        vectors: Task vectors from this start.
        samples: For each vector batches of inputs of the model, by argument name.
        level: ``submodule`` for blocks and their attention, cross-attention and MLP; ``block`` for blocks alone.
        distance: Between features. With the Euclidean one the two scores of a block are equal, as what comes in is the same on both sides.
        check_base: Refuse vectors that are known to start from different weights.
        progress: Called after each block is read, with the bytes read so far and the bytes in all.
        note: Called, before the model runs, with a sentence about every task whose samples have too few positions for the widest layer.

    Returns:
        One per vector. The features of a transformers model are what its body gives out, before any head.

    Raises:
        LataError: Samples and vectors are not equally many, a task has no samples, or the level is ``tensor``.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: See ``Walker``.

    Source: submodule linearity, arXiv:2504.10902.
    """
    if level not in ("block", "submodule"):
        raise LataError(f"linearity is measured per block or per submodule, not per {level}")
    if len(samples) != len(vectors) or not all(samples):
        raise LataError(f"every vector needs samples: got {sum(map(bool, samples))} sets that are not empty for {len(vectors)} vectors")
    found = []
    for number, (vector, batches) in enumerate(zip(vectors, samples, strict=True)):
        shifted = None if progress is None else _shifted(progress, number * len(SCALES), len(vectors) * len(SCALES))
        walker = Walker(start, [vector], batches, check_base=check_base)
        if note is not None:
            for sentence in few_positions(walker.shell, walker.blocks, [vector.label], [batches]):
                note(sentence)
        found.append(_measure(walker, vector.label, level, distance, shifted))
    return found


def _measure(walker: Walker, label: str, level: Level, distance: Distance, progress: Callable[[int], Progress] | None) -> Linearity:
    blocks, parts = walker.units("block"), walker.units("submodule") if level == "submodule" else []
    modules = {unit.module for unit in blocks}
    branch, output = ({unit.layer: _Mean() for unit in (*blocks, *parts)} for _ in range(2))

    def visit(passage: Passage) -> None:
        unit = passage.unit

        def left(scale: float, tensors: Sequence[str] = unit.tensors) -> Tensor:
            return passage.left if scale == 0 else passage.with_weights(0, scale, tensors)

        if unit.part != "block":
            if unit.module not in modules:
                branch[unit.layer].add(nonlinearity(left, distance))
            return
        kept = {scale: left(scale) for scale in SCALES}
        output[unit.layer].add(nonlinearity(kept.__getitem__, distance))
        if passage.entered is not None:
            entered = passage.entered
            branch[unit.layer].add(nonlinearity(lambda scale: kept[scale] - entered, distance))
        for part in parts:
            if part.block == unit.block:
                output[part.layer].add(nonlinearity(lambda scale, part=part: left(scale, part.tensors), distance))  # type: ignore[misc]

    whole: dict[float, list[Tensor]] = {}
    for number, scale in enumerate(SCALES):
        moving = None if progress is None else progress(number)
        units, visitor = ([*blocks, *parts], visit) if scale == 0 else ([], None)
        whole[scale] = walker.walk(units, visitor, scale=scale, progress=moving)
    model = _Mean()
    for batch in range(len(whole[0.0])):
        model.add(nonlinearity(lambda scale, batch=batch: whole[scale][batch], distance))  # type: ignore[misc]
    scores = [Score(MODEL, MODEL, None, None, model.value)]
    for depth, unit in enumerate(blocks):
        below: Mapping[str, str] = {unit.layer: "block", **{part.layer: part.part for part in parts if part.block == unit.block}}
        scores += [Score(layer, kind, depth, branch[layer].value, output[layer].value) for layer, kind in below.items()]
    return Linearity(label, tuple(scores))


def _shifted(progress: Progress, first: int, count: int) -> Callable[[int], Progress]:
    """Report the progress of one of several passes over the same bytes as a share of all passes."""
    return lambda number: lambda done, size: progress((first + number) * size + done, count * size)
