"""Non-linearity scores: how far a module is from linear along a task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.layers import Level
from lata_lightning.linearity.module_calls import ModuleCall, ModuleRuns
from lata_lightning.linearity.samples import Batch, few_positions
from lata_lightning.linearity.start import StartModel
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.task_vector import TaskVector

FeatureDistance = Callable[[Tensor, Tensor], Tensor]
"""Returns the distance at each position, (positions,), between two sets of features, both (positions, width)."""

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Boole's rule. Its nodes are exact in binary, so a linear module with exact arithmetic scores exactly zero.
_WEIGHTS = (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90)
MODEL = "model"


def l2_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the Euclidean distance at each position."""
    distance: Tensor = torch.linalg.vector_norm(one - other, dim=-1)
    return distance


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return one minus the cosine at each position."""
    return 1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)


def nonlinearity(features: Callable[[float], Tensor], distance: FeatureDistance = l2_distance) -> Tensor:
    """Return the non-linearity score of a module at each position.

    NLS = ∫₀¹∫₀¹ [ D(f(a), f(b)) / D(f(1), f(0)) − ``|a − b|`` ]² da db, with f(s) the output of the module at start + s · vector. The integral is
    approximated by Boole's rule on the five scales 0, ¼, ½, ¾ and 1 in each direction: exact for changes that are quadratic in s, two percent off for
    exponential ones.

    Args:
        features: f, returns features of shape (positions, width) at a scale; called once for each of the five scales.
        distance: D.

    Returns:
        Dimensionless, at least 0, float64 of shape (positions,); with the Euclidean distance 0 for a module that is linear along the vector. NaN at
        positions whose features the vector does not change.

    Source: submodule linearity, arXiv:2504.10902, non-linearity score.
    """
    at = [features(scale) for scale in SCALES]
    # Where this is 0, the score is NaN, from 0 / 0 at the two ends.
    whole = distance(at[-1], at[0]).double()
    score = torch.zeros_like(whole)
    for first, second in combinations(range(len(SCALES)), 2):
        ratio = distance(at[second], at[first]).double() / whole
        # Twice, because (b, a) is left out; where a = b the integrand is 0.
        score += 2 * _WEIGHTS[first] * _WEIGHTS[second] * (ratio - (SCALES[second] - SCALES[first])) ** 2
    return score


@dataclass(frozen=True)
class LayerScore:
    """Mean score of one module along one task vector, over the positions that the vector changes; None where it changes none.

    Attributes:
        layer: Name of the layer; ``model`` for the whole model.
        part: ``model``, ``block``, ``attention``, ``cross_attention`` or ``mlp``.
        depth: Number of the block; None for the whole model.
        branch: Score of the module's branch, its output before it is added to the residual stream. None where that is not known: for the whole model, for
            a part that is not a separate module, and for a block that changes the shape.
        output: Score of the output of the block (or model) when only this module's weights move.
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
    scores: tuple[LayerScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)


class _Mean:
    """Mean over positions, without NaN."""

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
    distance: FeatureDistance = l2_distance,
    check_base: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Linearity]:
    """Measure the non-linearity scores of the whole model, of each block and of its parts, along each task vector.

    The input of a module is the hidden states of the start model, whatever its own weights; the input of the whole model is the samples. The model runs
    block by block as in ``solve_coefficients``, five times for each vector.

    Args:
        start: Directory or hub id of a transformers model, or a module, which does not change. Dropout is off.
        vectors: Task vectors from this start.
        samples: For each vector, batches of inputs of the model by argument name.
        level: ``submodule`` for blocks and their attention, cross-attention and MLP; ``block`` for blocks alone.
        distance: Distance between features. With the Euclidean distance the two scores of a block are equal, because its input is the same at all scales.
        check_base: Refuse vectors that are known to start from different weights.
        progress: Called after each block is read, with the bytes read so far and the bytes in all.
        note: Called, before the model runs, with a sentence about each task whose samples have too few positions for the widest layer.

    Returns:
        The scores of each vector. The features of a transformers model are the output of its body, before any head.

    Raises:
        LataError: The numbers of samples and vectors differ, a task has no samples, or the level is ``tensor``.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: As for ``ModuleRuns``.

    Source: submodule linearity, arXiv:2504.10902.
    """
    if level not in ("block", "submodule"):
        raise LataError(f"linearity is measured per block or per submodule, not per {level}")
    if len(samples) != len(vectors) or not all(samples):
        raise LataError(f"every vector needs samples: got {sum(map(bool, samples))} sets that are not empty for {len(vectors)} vectors")
    scores = []
    for number, (vector, batches) in enumerate(zip(vectors, samples, strict=True)):
        shifted = None if progress is None else _shifted(progress, number * len(SCALES), len(vectors) * len(SCALES))
        runs = ModuleRuns(start, [vector], batches, check_base=check_base)
        if note is not None:
            for sentence in few_positions(runs.model, runs.blocks, [vector.label], [batches]):
                note(sentence)
        scores.append(_measure(runs, vector.label, level, distance, shifted))
    return scores


def _measure(
    runs: ModuleRuns, label: str, level: Level, distance: FeatureDistance, progress: Callable[[int], Progress] | None
) -> Linearity:
    blocks = runs.blocks.layer_modules("block")
    parts = runs.blocks.layer_modules("submodule") if level == "submodule" else []
    paths = {block.module for block in blocks}
    branch, output = ({module.layer: _Mean() for module in (*blocks, *parts)} for _ in range(2))

    def visit(call: ModuleCall) -> None:
        module = call.layer

        def outputs(scale: float, tensors: Sequence[str] = module.tensors) -> Tensor:
            return call.outputs if scale == 0 else call.with_weights(0, scale, tensors)

        if module.part != "block":
            if module.module not in paths:
                branch[module.layer].add(nonlinearity(outputs, distance))
            return
        by_scale = {scale: outputs(scale) for scale in SCALES}
        output[module.layer].add(nonlinearity(by_scale.__getitem__, distance))
        if call.inputs is not None:
            inputs = call.inputs
            branch[module.layer].add(nonlinearity(lambda scale: by_scale[scale] - inputs, distance))
        for part in parts:
            if part.block == module.block:
                output[part.layer].add(nonlinearity(lambda scale, part=part: outputs(scale, part.tensors), distance))  # type: ignore[misc]

    whole: dict[float, list[Tensor]] = {}
    for number, scale in enumerate(SCALES):
        moving = None if progress is None else progress(number)
        modules, visitor = ([*blocks, *parts], visit) if scale == 0 else ([], None)
        whole[scale] = runs.run(modules, visitor, scale=scale, progress=moving)
    model = _Mean()
    for batch in range(len(whole[0.0])):
        model.add(nonlinearity(lambda scale, batch=batch: whole[scale][batch], distance))  # type: ignore[misc]
    scores = [LayerScore(MODEL, MODEL, None, None, model.value)]
    for depth, block in enumerate(blocks):
        below: Mapping[str, str] = {block.layer: "block", **{part.layer: part.part for part in parts if part.block == block.block}}
        scores += [LayerScore(layer, kind, depth, branch[layer].value, output[layer].value) for layer, kind in below.items()]
    return Linearity(label, tuple(scores))


def _shifted(progress: Progress, first: int, count: int) -> Callable[[int], Progress]:
    """Return a function that reports the progress of one of several passes over the same bytes as a share of all passes."""
    return lambda number: lambda done, size: progress((first + number) * size + done, count * size)
