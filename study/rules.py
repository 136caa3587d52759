"""Every method, control and candidate that is compared: from the models of a case to what is added, once or several times, to instruct or start.

Sums are sums: at scale 1 plain task arithmetic adds all vectors whole. The published rows (kind ``method``) take vectors as tuned − start and go onto the
start, as published; for experts tuned from base that is base. LATA goes onto instruct in either case (base plus the instruction vector, plus the pure
vectors), and so does whatever is marked as anchored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from peft.utils import merge_utils
from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.tuning import under_rules
from lata_lightning.layers import LEVELS, Level
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.matrix_merges import MatrixMethod
from lata_lightning.linearity.regression import regress
from lata_lightning.linearity.solving import DEFAULT_RIDGE, Products, solve_coefficients
from lata_lightning.moments import STARTS, Start
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting, coefficients, linear_drop_by_rank
from study import layerwise, matrices
from study.cases import Batch, Weights, summed
from study.cases import Case as Case
from study.layerwise import RULES, Coefficients
from study.statistics import FIRST_DEVELOPMENT_SEED

Build = Callable[[Case], Weights]
Kind = Literal["method", "control", "candidate"]
Onto = Literal["start", "instruct"]

TASK_ARITHMETIC = "task arithmetic"
ANCHORED = "task arithmetic, anchored"
REGRESSION = "lata regress"
WITHOUT_SAMPLES = "lata regress without samples"
RANDOM_ROWS = 5
CONFIRMED = (
    REGRESSION,
    f"{REGRESSION} --in-order false",
    "less where shared, block",
    "own direction kept, block",
    "across instruction, block",
    "TSV-M, anchored",
    WITHOUT_SAMPLES,
    f"{WITHOUT_SAMPLES}, anchored",
    "few-shot from LATA linear",
    "few-shot from uniform",
)
"""The candidates that the other seeds are to confirm: chosen by validation scores of development seeds."""
FIRST_SCREEN = (
    TASK_ARITHMETIC,
    ANCHORED,
    "TSV-M",
    "Iso-C",
    *(f"LATA {rule}, block" for rule in ("linear", "log", "threshold")),
    "LATA linear, outside 1",
    "blocks only",
    *(f"random linear {number}" for number in range(1, RANDOM_ROWS + 1)),
    REGRESSION,
    f"{REGRESSION} --in-order false",
    WITHOUT_SAMPLES,
    f"{WITHOUT_SAMPLES}, anchored",
)
"""The rows that every seed runs; the others were run on the first five."""
FEW_SHOT_TRIALS = 40
_FIRST_SCALES = (0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Method:
    """One row: merged = onto + scale · build(case).

    Attributes:
        name: In results and tables.
        kind: Published method, control, or candidate for something better.
        onto: What is added to: the start of the experts, or instruct.
        build: The delta at scale 1, by tensor name, float32.
        starts: For experts tuned from which models it is a row of its own.
        tuned: Whether it looks at validation scores beyond the choice of the scale.
    """

    name: str
    kind: Kind
    onto: Onto
    build: Build
    starts: tuple[Start, ...] = STARTS
    tuned: bool = False

    def weights(self, case: Case) -> Weights:
        """What scale · delta is added to."""
        return case.start if self.onto == "start" else case.instruct


def methods_for(start: Start, seed: int = FIRST_DEVELOPMENT_SEED, rows: Collection[str] | None = None) -> dict[str, Method]:
    """The rows for experts tuned from instruct, or from base, by name; on seeds that confirm, of the candidates only ``CONFIRMED``.

    Args:
        start: What the experts were tuned from.
        seed: Of the models; from 100 on all candidates are rows.
        rows: Only these of them.

    Raises:
        LataError: There is no row of that name.
    """
    unknown = [name for name in rows or () if name not in METHODS]
    if unknown:
        raise LataError(f"unknown row {first_three(unknown)}; the rows are {', '.join(METHODS)}")
    development = seed >= FIRST_DEVELOPMENT_SEED
    return {
        name: method
        for name, method in METHODS.items()
        if start in method.starts and (development or method.kind != "candidate" or name in CONFIRMED) and (rows is None or name in rows)
    }


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


def regressed(case: Case, in_order: bool) -> Weights:
    """Every linear layer fitted to the outputs of all experts on their own calibration inputs, by the package."""
    _load(case, case.instruct)
    return summed([regress(case.anchored, case.model, case.calibration, in_order=in_order)])


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


def _listed() -> list[Method]:
    from_base: tuple[Start, ...] = ("base",)
    method, control, candidate = (partial(Method, kind=kind) for kind in ("method", "control", "candidate"))
    rules: tuple[Weighting, ...] = ("linear", "log", "threshold")
    gram_rules = {
        "own direction kept": layerwise.keeping_own_direction,
        "less where shared": layerwise.less_where_shared,
        "equal norms": layerwise.equal_norms,
        "sign agreement": layerwise.agreement,
    }
    return [
        method(TASK_ARITHMETIC, onto="start", build=task_arithmetic),
        *(method(f"TIES {density:g}", onto="start", build=partial(ties, density=density)) for density in (0.2, 0.5)),
        method("DARE 0.5", onto="start", build=partial(dare, density=0.5)),
        method("DARE 0.5 + TIES", onto="start", build=partial(dare_ties, density=0.5)),
        method("Iso-C", onto="start", build=partial(from_vectors, method="iso", anchored=False)),
        method("Iso-CTS", onto="start", build=partial(by_matrix, merge=matrices.iso_cts)),
        method("TSV-M", onto="start", build=partial(from_vectors, method="tsv", anchored=False)),
        *(
            method(f"LATA {rule}, {level}", onto="instruct", build=partial(lata, weighting=rule, level=level))
            for level in LEVELS
            for rule in rules
        ),
        method("closed form, model", onto="start", build=closed_form_of_model),
        method("closed form, block", onto="start", build=partial(closed_form, level="block")),
        method("closed form, submodule", onto="start", build=partial(closed_form, level="submodule")),
        control(ANCHORED, onto="instruct", build=anchored, starts=from_base),
        # The instruction component is counted twice and more.
        control("task arithmetic on instruct", onto="instruct", build=task_arithmetic, starts=from_base),
        control("blocks only", onto="instruct", build=blocks_only),
        *(
            control(f"LATA {rule}, outside 1", onto="instruct", build=partial(lata, weighting=rule, level="block", outside=1.0))
            for rule in rules[:2]
        ),
        *(control(f"by relative norm, {rule}", onto="instruct", build=partial(by_relative_norm, rule=rule)) for rule in RULES),
        *(
            control(f"random {rule} {number}", onto="instruct", build=partial(random_ranks, rule=rule, number=number))
            for rule in RULES
            for number in range(1, RANDOM_ROWS + 1)
        ),
        *(control(f"reversed {rule}", onto="instruct", build=partial(reversed_ranks, rule=rule)) for rule in RULES),
        control("by depth, rising", onto="instruct", build=partial(by_depth, rising=True)),
        control("by depth, falling", onto="instruct", build=partial(by_depth, rising=False)),
        candidate("sine of alignment", onto="instruct", build=partial(by_value, level="block", values=layerwise.sines)),
        candidate("1 − alignment", onto="instruct", build=partial(by_value, level="block", values=layerwise.distances)),
        candidate("away from instruction, block", onto="instruct", build=partial(away_from_instruction, level="block")),
        candidate("across instruction, block", onto="instruct", build=partial(across_instruction, level="block")),
        candidate("across instruction, tensor", onto="instruct", build=partial(across_instruction, level="tensor")),
        *(
            candidate(f"{name}, {level}", onto="instruct", build=partial(together, level=level, rule=rule))
            for name, rule in gram_rules.items()
            for level in LEVELS
            if level != "submodule"
        ),
        candidate(
            "closed form, submodule, anchored",
            onto="instruct",
            build=partial(closed_form, level="submodule", anchored=True),
            starts=from_base,
        ),
        candidate("TSV-M, anchored", onto="instruct", build=partial(from_vectors, method="tsv"), starts=from_base),
        candidate(WITHOUT_SAMPLES, onto="start", build=partial(from_vectors, anchored=False)),
        candidate(f"{WITHOUT_SAMPLES}, anchored", onto="instruct", build=from_vectors, starts=from_base),
        candidate(
            "interference regression", onto="instruct", build=partial(by_matrix, merge=matrices.interference_regression, anchored=True)
        ),
        candidate(REGRESSION, onto="instruct", build=partial(regressed, in_order=True)),
        candidate(f"{REGRESSION} --in-order false", onto="instruct", build=partial(regressed, in_order=False)),
        candidate("few-shot from LATA linear", onto="instruct", build=partial(few_shot, first="linear"), tuned=True),
        candidate("few-shot from uniform", onto="instruct", build=partial(few_shot, first="none"), tuned=True),
    ]


METHODS: dict[str, Method] = {method.name: method for method in _listed()}
