"""Coefficients per layer, for every vector of a merge: by rank, by alignment values, by what the vectors do to one another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.layers import Level
from lata_lightning.moments import Moments, total
from lata_lightning.vectors.aligning import measure
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import linear_drop_by_rank, log_drop_by_rank

Coefficients = dict[str, float]
Rule = Callable[[Mapping[str, float]], Coefficients]
RULES: dict[str, Rule] = {"linear": linear_drop_by_rank, "log": log_drop_by_rank}
OUTSIDE = ""
"""Key of all tensors that belong to no layer, taken as one more layer."""
_RIDGE = 1e-6


def random_values(layers: Sequence[str], seed: str) -> dict[str, float]:
    """A random number by layer, to rank by; the same for the same seed on every machine."""
    numbers = random.Random(seed)
    return {layer: numbers.random() for layer in layers}


def relative_norms(alignment: Alignment) -> dict[str, float]:
    """Minus ‖task vector‖ / ‖instruction vector‖ by layer: ranked by it, the layer that moved least gets the smallest coefficient, as in LATA."""
    return {layer: -(stats.relative_norm or 0.0) for layer, stats in alignment.layers.items()}


def with_mean_one(values: Mapping[str, float]) -> Coefficients:
    """The values times one number, so that their mean is 1; all 1 if they are all 0."""
    mean = sum(values.values()) / len(values)
    return {layer: value / mean if mean else 1.0 for layer, value in values.items()}


def sines(alignment: Alignment) -> Coefficients:
    """√(1 − alignment²) with mean 1: the share of the complex vector that lies across the instruction vector."""
    return with_mean_one({layer: math.sqrt(max(0.0, 1 - value * value)) for layer, value in alignment.values.items()})


def distances(alignment: Alignment) -> Coefficients:
    """1 − alignment, with mean 1."""
    return with_mean_one({layer: 1 - value for layer, value in alignment.values.items()})


def instruction_moments(vector: TaskVector, instruction: TaskVector, level: Level) -> dict[str, Moments]:
    """The three sums by layer, for a vector that counts from instruct."""
    table = measure(vector, instruction)
    return {layer: total(table[name] for name in names) for layer, names in layers_and_outside(vector, level).items()}


def away_from_instruction(vector: TaskVector, instruction: TaskVector, level: Level) -> Coefficients:
    """1 − cos(task vector, instruction vector) where that cosine is positive, else 1."""
    found = {}
    for layer, sums in instruction_moments(vector, instruction, level).items():
        norms = sums.task_norm * sums.instruction_norm
        found[layer] = 1 - max(0.0, sums.inner / norms) if norms else 1.0
    return found


def across_instruction(vector: TaskVector, instruction: TaskVector, level: Level) -> dict[str, Tensor]:
    """The vector less its projection on the instruction vector, layer by layer, in float64."""
    found = {}
    sums = instruction_moments(vector, instruction, level)
    for layer, names in layers_and_outside(vector, level).items():
        share = sums[layer].inner / sums[layer].instruction if sums[layer].instruction else 0.0
        for name in names:
            found[name] = vector[name].double() - share * instruction[name].double()
    return found


def gram(vectors: Sequence[TaskVector], level: Level) -> dict[str, Tensor]:
    """⟨τ_s, τ_u⟩ by layer, float64, shape (vectors, vectors)."""
    found = {}
    for layer, names in layers_and_outside(vectors[0], level).items():
        flat = torch.stack([torch.cat([vector[name].double().reshape(-1) for name in names]) for vector in vectors])
        found[layer] = flat @ flat.T
    return found


def keeping_own_direction(vectors: Sequence[TaskVector], level: Level) -> list[Coefficients]:
    """Coefficients with which the merged vector has, along every task vector, that vector's own length.

    They solve ⟨τ_s, Σ_u a_u τ_u⟩ = ‖τ_s‖² in every layer: 1 where the vectors are orthogonal, 1/n for n equal ones.
    """
    found: list[Coefficients] = [{} for _ in vectors]
    for layer, inner in gram(vectors, level).items():
        ridge = _RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
        solved = torch.linalg.lstsq(inner + ridge, inner.diagonal()[:, None], driver="gelsd").solution[:, 0]
        for coefficients, number in zip(found, solved.tolist(), strict=True):
            coefficients[layer] = number
    return found


def less_where_shared(vectors: Sequence[TaskVector], level: Level) -> list[Coefficients]:
    """1 / (1 + Σ of the positive cosines with the other vectors)."""
    found: list[Coefficients] = [{} for _ in vectors]
    for layer, inner in gram(vectors, level).items():
        norms = inner.diagonal().sqrt()
        cosines = (inner / torch.outer(norms, norms).clamp_min(torch.finfo(inner.dtype).tiny)).clamp_min(0)
        shared = cosines.sum(1) - cosines.diagonal()
        for coefficients, number in zip(found, (1 / (1 + shared)).tolist(), strict=True):
            coefficients[layer] = number
    return found


def equal_norms(vectors: Sequence[TaskVector], level: Level) -> list[Coefficients]:
    """Mean norm of the layer over the vectors / the vector's own: every vector moves a layer equally far."""
    found: list[Coefficients] = [{} for _ in vectors]
    for layer, inner in gram(vectors, level).items():
        norms = inner.diagonal().sqrt()
        for coefficients, norm in zip(found, norms.tolist(), strict=True):
            coefficients[layer] = float(norms.mean()) / norm if norm else 1.0
    return found


def agreement(vectors: Sequence[TaskVector], level: Level) -> list[Coefficients]:
    """‖Σ τ‖₁ / Σ ‖τ‖₁, with mean 1 over the layers: small where entries of opposite sign cancel; the same for every vector."""
    found = {}
    for layer, names in layers_and_outside(vectors[0], level).items():
        stacked = torch.stack([torch.cat([vector[name].double().reshape(-1) for name in names]) for vector in vectors])
        mass = float(stacked.abs().sum())
        found[layer] = float(stacked.sum(0).abs().sum()) / mass if mass else 0.0
    return [with_mean_one(found) for _ in vectors]


def layers_and_outside(vector: TaskVector, level: Level) -> dict[str, list[str]]:
    """Tensor names by layer, and those that belong to none under ``OUTSIDE`` if there are any."""
    outside = list(vector.layers.outside())
    return {**vector.layers.layers(level), **({OUTSIDE: outside} if outside else {})}


def weighted(vector: TaskVector, coefficients: Mapping[str, float], level: Level, outside: float = 0.0) -> TaskVector:
    """The pure vector under these coefficients; those of ``OUTSIDE`` go before ``outside``."""
    inside = {layer: number for layer, number in coefficients.items() if layer != OUTSIDE}
    return vector.with_coefficients(inside, level=level, outside=coefficients.get(OUTSIDE, outside)).pure()
