"""What is computed for every row of the comparison: from the models of a case to what is added, once or several times, to instruct or start.

Sums are sums: at scale 1 plain task arithmetic adds all vectors whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.evaluation.tuning import under_rules
from lata_lightning.layers import Level
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.methods import MatrixMethod
from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.solving import DEFAULT_RIDGE, Products, solve_coefficients
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting, coefficients, linear_drop_by_rank
from study import layerwise
from study.cases import Batch, Case, Weights, summed
from study.layerwise import RULES, Coefficients

FEW_SHOT_TRIALS = 40
_FIRST_SCALES = (0.2, 0.35, 0.5, 0.75, 1.0)


# Published methods.


def task_arithmetic(case: Case) -> Weights:
    """Σ (expert − start); arXiv:2212.04089."""
    return summed(case.vectors)


def ties(case: Case, density: float) -> Weights:
    """TIES by peft, over all weights as one vector, as in the publication (arXiv:2306.01708); entries that agree are averaged."""
    return _flat(case, partial(merge_utils.ties, density=density))


def dare(case: Case, density: float) -> Weights:
    """DARE by peft (arXiv:2311.03099): entries kept at random and enlarged, then added."""
    return _flat(case, partial(merge_utils.dare_linear, density=density))


def dare_ties(case: Case, density: float) -> Weights:
    """DARE, then sign election and the mean of TIES, by peft."""
    return _flat(case, partial(merge_utils.dare_ties, density=density))


def by_matrix(case: Case, merge: Callable[..., Weights], anchored: bool = False) -> Weights:
    """A merge of the matrices inside the blocks, the mean of everything else."""
    vectors = case.anchored if anchored else case.vectors
    return merge(vectors, block_matrices(vectors[0]))


def lata(case: Case, weighting: Weighting, level: Level, outside: float = 0.0) -> Weights:
    """Σ of pure vectors, by the package's own rule; arXiv:2502.20186."""
    found = under_rules(case.vectors, [weighting], case.instruction, level=level, threshold=DEFAULT_THRESHOLD, outside=outside)
    return summed([vector.pure() for vector in found[weighting]])


def closed_form(case: Case, level: Level, anchored: bool = False) -> Weights:
    """Coefficients per layer from samples, by the package; arXiv:2504.10902. Everything outside the layers has coefficient 1."""
    vectors = _from_model(case, anchored)
    return summed([vector.pure() for vector in solve_coefficients(case.model, vectors, case.calibration, level=level).apply(vectors)])


def closed_form_of_model(case: Case) -> Weights:
    """The same for the whole model as one module: one coefficient a vector, from its logits."""
    vectors = _from_model(case, anchored=False)
    products = Products(len(vectors))
    batches = [(task, batch) for task, found in enumerate(case.calibration) for batch in found]
    before = [_logits(case, batch) for _, batch in batches]
    changes: list[list[Tensor]] = [[] for _ in batches]
    for expert in case.experts:
        _load(case, expert)
        for number, (_, batch) in enumerate(batches):
            changes[number].append(_logits(case, batch) - before[number])
    for (task, _), found in zip(batches, changes, strict=True):
        products.add(task, torch.stack(found))
    coefficients, _ = products.solve(DEFAULT_RIDGE)
    return summed(
        [{name: number * tensor.double() for name, tensor in vector.items()} for vector, number in zip(vectors, coefficients, strict=True)]
    )


# Controls.


def anchored(case: Case) -> Weights:
    """Σ (expert − instruct)."""
    return summed(case.anchored)


def blocks_only(case: Case) -> Weights:
    """Σ (expert − instruct) inside the blocks, 0 outside: LATA with all coefficients 1."""
    return per_layer(case, "block", lambda _, alignment: dict.fromkeys(alignment.layers, 1.0))


def by_relative_norm(case: Case, rule: str) -> Weights:
    """A rule of LATA on ranks by the relative norm alone."""
    return per_layer(case, "block", lambda _, alignment: RULES[rule](layerwise.relative_norms(alignment)))


def random_ranks(case: Case, rule: str, number: int) -> Weights:
    """A rule of LATA on random ranks, drawn anew for every expert and seed."""

    def drawn(expert: int, alignment: Alignment) -> Coefficients:
        return RULES[rule](layerwise.random_values(list(alignment.layers), f"{case.seed}/{number}/{expert}"))

    return per_layer(case, "block", drawn)


def reversed_ranks(case: Case, rule: str) -> Weights:
    """A rule of LATA with the best aligned layers most."""
    return per_layer(case, "block", lambda _, alignment: RULES[rule]({layer: -value for layer, value in alignment.values.items()}))


def by_depth(case: Case, rising: bool) -> Weights:
    """The linear rule on ranks by depth."""

    def ranked(_: int, alignment: Alignment) -> Coefficients:
        return linear_drop_by_rank({layer: float(-index if rising else index) for index, layer in enumerate(alignment.layers)})

    return per_layer(case, "block", ranked)


# Candidates: onto instruct, with coefficient 1 (or the same rule) outside the blocks.


def by_value(case: Case, level: Level, values: Callable[[Alignment], Coefficients]) -> Weights:
    """Coefficients from the values of the alignments instead of their ranks."""
    return per_layer(case, level, lambda _, alignment: values(alignment), outside=1.0)


def away_from_instruction(case: Case, level: Level) -> Weights:
    """Less of a layer that goes along instruction following."""
    return _each(case, level, [layerwise.away_from_instruction(vector, case.instruction, level) for vector in case.anchored])


def across_instruction(case: Case, level: Level) -> Weights:
    """Every layer of every vector projected off the instruction vector."""
    return summed([layerwise.across_instruction(vector, case.instruction, level) for vector in case.anchored])


def together(case: Case, level: Level, rule: Callable[[Sequence[TaskVector], Level], list[Coefficients]]) -> Weights:
    """Coefficients from what the vectors of the merge have to do with one another."""
    return _each(case, level, rule(case.anchored, level))


def regressed(case: Case, **options: Any) -> Weights:
    """Every linear layer fitted to the outputs of all experts on their own calibration inputs, by the package; options as for ``regress``."""
    _load(case, case.instruct)
    return summed([regress(case.anchored, case.model, case.calibration, **options)])


def from_vectors(case: Case, method: MatrixMethod = "regression", anchored: bool = True) -> Weights:
    """One vector made of the vectors alone, by the package."""
    return summed([merge_matrices(case.anchored if anchored else case.vectors, method, check_base=False)])


def few_shot(case: Case, first: Weighting) -> Weights:
    """Coefficients per block and expert, and one outside the blocks, searched by validation score from those of a rule.

    Of the 40 models that are scored, five find the scale to begin with; the others are steps of a (1 + 1) evolution strategy that multiplies all
    coefficients by log-normal numbers, with longer steps after a success and shorter ones after a failure.
    """
    numbers = random.Random(f"{case.seed}/few-shot")
    current = [{**coefficients(alignment, first), layerwise.OUTSIDE: 1.0} for alignment in case.alignments("block")]

    def score(tables: list[Coefficients]) -> float:
        delta = _each(case, "block", tables)
        return case.validation_score({name: tensor + delta[name] for name, tensor in case.instruct.items()})

    scaled = [[{layer: scale * number for layer, number in table.items()} for table in current] for scale in _FIRST_SCALES]
    scores = [score(tables) for tables in scaled]
    best = max(scores)
    current, step = scaled[scores.index(best)], 0.3
    for _ in range(FEW_SHOT_TRIALS - len(scores)):
        trial = [{layer: number * numbers.lognormvariate(0, step) for layer, number in table.items()} for table in current]
        found = score(trial)
        if found > best:
            current, best, step = trial, found, step * 1.5
        else:
            step *= 0.9
    return _each(case, "block", current)


# What they share.


def per_layer(case: Case, level: Level, rule: Callable[[int, Alignment], Mapping[str, float]], outside: float = 0.0) -> Weights:
    """Σ (expert − instruct) · coefficients, which the rule gives for every expert by its number and its alignment."""
    return _each(case, level, [rule(number, alignment) for number, alignment in enumerate(case.alignments(level))], outside)


def block_matrices(vector: TaskVector) -> set[str]:
    """Names of the two-dimensional tensors inside the blocks."""
    return {name for names in vector.layers.layers().values() for name in names if len(vector.shape(name)) == 2}


def _each(case: Case, level: Level, tables: Sequence[Mapping[str, float]], outside: float = 0.0) -> Weights:
    pairs = zip(case.anchored, tables, strict=True)
    return summed([layerwise.weighted(vector, table, level, outside) for vector, table in pairs])


def _flat(case: Case, merge: Callable[..., Tensor]) -> Weights:
    """A merge by peft of all weights as one vector."""
    names = list(case.vectors[0])
    flat = [torch.cat([vector[name].reshape(-1) for name in names]) for vector in case.vectors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        found = merge(flat, torch.ones(len(flat)))
    shapes = [case.vectors[0].shape(name) for name in names]
    pieces = torch.split(found, [torch.Size(shape).numel() for shape in shapes])
    return {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}


def _from_model(case: Case, anchored: bool) -> list[TaskVector]:
    """Vectors that count from what the scratch model now holds: the start of the experts, or instruct."""
    _load(case, case.instruct if anchored else case.start)
    if anchored:
        return case.anchored
    # In the words of the package these start from instruct even if that is base: they are differences from the model that is run.
    return [TaskVector.between(case.start, expert) for expert in case.experts]


def _load(case: Case, weights: Weights) -> None:
    case.model.load_state_dict(dict(weights))
    case.model.eval()


@torch.no_grad()
def _logits(case: Case, batch: Batch) -> Tensor:
    """Of shape (positions, vocabulary), padding left out."""
    logits: Tensor = case.model(**batch).logits
    mask = batch.get("attention_mask")
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]
