"""The table of every method, control and candidate that is compared.

The published rows (kind ``method``) take vectors as tuned − start and go onto the
start, as published; for experts tuned from base that is base. LATA goes onto instruct in either case (base plus the instruction vector, plus the pure
vectors), and so does whatever is marked as anchored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import LEVELS
from lata_lightning.moments import STARTS, Start
from lata_lightning.weighting import Weighting
from study import layerwise, matrices, methods
from study.cases import Case, Weights
from study.layerwise import RULES
from study.statistics import FIRST_DEVELOPMENT_SEED

Build = Callable[[Case], Weights]
Kind = Literal["method", "control", "candidate"]
Onto = Literal["start", "instruct"]

TASK_ARITHMETIC = "task arithmetic"
ANCHORED = "task arithmetic, anchored"
REGRESSION = "lata regress"
TOWARDS_SUM = f"{REGRESSION} --prior sum --ridge 1"
"""With samples, the prior and the ridge that development seeds chose."""
WITHOUT_SAMPLES = "lata regress without samples"
RANDOM_ROWS = 5
CONFIRMED = (
    REGRESSION,
    f"{REGRESSION} --in-order false",
    TOWARDS_SUM,
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
EVERY_SEED = (
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
    TOWARDS_SUM,
    WITHOUT_SAMPLES,
    f"{WITHOUT_SAMPLES}, anchored",
)
"""The rows that every seed runs; the others were run on the first five."""


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
        method(TASK_ARITHMETIC, onto="start", build=methods.task_arithmetic),
        *(method(f"TIES {density:g}", onto="start", build=partial(methods.ties, density=density)) for density in (0.2, 0.5)),
        method("DARE 0.5", onto="start", build=partial(methods.dare, density=0.5)),
        method("DARE 0.5 + TIES", onto="start", build=partial(methods.dare_ties, density=0.5)),
        method("Iso-C", onto="start", build=partial(methods.from_vectors, method="iso", anchored=False)),
        method("Iso-CTS", onto="start", build=partial(methods.by_matrix, merge=matrices.iso_cts)),
        method("TSV-M", onto="start", build=partial(methods.from_vectors, method="tsv", anchored=False)),
        *(
            method(f"LATA {rule}, {level}", onto="instruct", build=partial(methods.lata, weighting=rule, level=level))
            for level in LEVELS
            for rule in rules
        ),
        method("closed form, model", onto="start", build=methods.closed_form_of_model),
        method("closed form, block", onto="start", build=partial(methods.closed_form, level="block")),
        method("closed form, submodule", onto="start", build=partial(methods.closed_form, level="submodule")),
        control(ANCHORED, onto="instruct", build=methods.anchored, starts=from_base),
        # The instruction component is counted twice and more.
        control("task arithmetic on instruct", onto="instruct", build=methods.task_arithmetic, starts=from_base),
        control("blocks only", onto="instruct", build=methods.blocks_only),
        *(
            control(f"LATA {rule}, outside 1", onto="instruct", build=partial(methods.lata, weighting=rule, level="block", outside=1.0))
            for rule in rules[:2]
        ),
        *(control(f"by relative norm, {rule}", onto="instruct", build=partial(methods.by_relative_norm, rule=rule)) for rule in RULES),
        *(
            control(f"random {rule} {number}", onto="instruct", build=partial(methods.random_ranks, rule=rule, number=number))
            for rule in RULES
            for number in range(1, RANDOM_ROWS + 1)
        ),
        *(control(f"reversed {rule}", onto="instruct", build=partial(methods.reversed_ranks, rule=rule)) for rule in RULES),
        control("by depth, rising", onto="instruct", build=partial(methods.by_depth, rising=True)),
        control("by depth, falling", onto="instruct", build=partial(methods.by_depth, rising=False)),
        candidate("sine of alignment", onto="instruct", build=partial(methods.by_value, level="block", values=layerwise.sines)),
        candidate("1 − alignment", onto="instruct", build=partial(methods.by_value, level="block", values=layerwise.distances)),
        candidate("away from instruction, block", onto="instruct", build=partial(methods.away_from_instruction, level="block")),
        candidate("across instruction, block", onto="instruct", build=partial(methods.across_instruction, level="block")),
        candidate("across instruction, tensor", onto="instruct", build=partial(methods.across_instruction, level="tensor")),
        *(
            candidate(f"{name}, {level}", onto="instruct", build=partial(methods.together, level=level, rule=rule))
            for name, rule in gram_rules.items()
            for level in LEVELS
            if level != "submodule"
        ),
        candidate(
            "closed form, submodule, anchored",
            onto="instruct",
            build=partial(methods.closed_form, level="submodule", anchored=True),
            starts=from_base,
        ),
        candidate("TSV-M, anchored", onto="instruct", build=partial(methods.from_vectors, method="tsv"), starts=from_base),
        candidate(WITHOUT_SAMPLES, onto="start", build=partial(methods.from_vectors, anchored=False)),
        candidate(f"{WITHOUT_SAMPLES}, anchored", onto="instruct", build=methods.from_vectors, starts=from_base),
        candidate(
            "interference regression",
            onto="instruct",
            build=partial(methods.by_matrix, merge=matrices.interference_regression, anchored=True),
        ),
        candidate(REGRESSION, onto="instruct", build=methods.regressed),
        candidate(TOWARDS_SUM, onto="instruct", build=partial(methods.regressed, prior="sum", ridge=1.0)),
        candidate(f"{REGRESSION} --in-order false", onto="instruct", build=partial(methods.regressed, in_order=False)),
        candidate("few-shot from LATA linear", onto="instruct", build=partial(methods.few_shot, first="linear"), tuned=True),
        candidate("few-shot from uniform", onto="instruct", build=partial(methods.few_shot, first="none"), tuned=True),
    ]


METHODS: dict[str, Method] = {method.name: method for method in _listed()}
