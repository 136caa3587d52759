"""The methods that need nothing but coefficients and a scale, so that their merges can be streamed tensor by tensor from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import LEVELS, Level
from lata_lightning.merging.weigh import weigh
from lata_lightning.moments import Start
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import Weighting, linear_drop_by_rank
from study import layerwise
from study.rules import ANCHORED, METHODS, RANDOM_ROWS, TASK_ARITHMETIC, methods_for


class Measured(NamedTuple):
    """One expert, as a method sees it.

    Attributes:
        vector: Expert − instruct.
        alignment: With the instruction vector, on the level of the method.
        number: Of the expert, from 0.
        seed: Of everything random.
    """

    vector: TaskVector
    alignment: Alignment
    number: int
    seed: int


@dataclass(frozen=True)
class Streamed:
    """How a method of ``study.rules`` weights one vector.

    Attributes:
        weight: The vector with its coefficients; None for plain task arithmetic, which takes vectors as they are.
        level: Of the alignment.
        anchored: Whether vectors are expert − instruct; otherwise they are expert − start.
    """

    weight: Callable[[Measured], TaskVector] | None = None
    level: Level = "block"
    anchored: bool = True


def lata(expert: Measured, weighting: Weighting, outside: float = 0.0) -> TaskVector:
    """Coefficients by a rule of the package."""
    return weigh(expert.vector, weighting, alignment=expert.alignment, outside=outside)


def by_layer(expert: Measured, coefficients: Callable[[Measured], Mapping[str, float]], outside: float = 0.0) -> TaskVector:
    """Coefficients from anything that was measured."""
    return expert.vector.with_coefficients(coefficients(expert), level=expert.alignment.level, outside=outside)


def check_methods(names: Sequence[str]) -> None:
    """Refuse names that no method has, and methods that cannot be streamed.

    Raises:
        LataError: One is unknown, needs more than coefficients, or stands there twice; or there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise LataError(f"there are no such methods: {first_three(unknown)}. Streamed from disk can be {', '.join(STREAMED)}")
    other = [name for name in names if name not in STREAMED]
    if other:
        raise LataError(
            f"only coefficients and a scale can be streamed from disk, and these methods need more: {first_three(other)}. For TIES and DARE write "
            "lata export --to mergekit and change merge_method there; for closed-form coefficients see lata solve."
        )
    if not names or len(set(names)) < len(names):
        raise LataError(f"methods must be given once each and at least one, got {len(names)} with {len(set(names))} different names")


def check_start_of(names: Sequence[str], start: Start) -> None:
    """Refuse methods that are none of their own for experts tuned from this start.

    Raises:
        LataError: There is one.
    """
    other = [name for name in names if name not in methods_for(start)]
    if other:
        raise LataError(
            f"for experts tuned from {start} these methods are the same as plain task arithmetic: {first_three(other)}; leave them out"
        )


def _random(expert: Measured, rule: str, number: int) -> Mapping[str, float]:
    values = layerwise.random_values(list(expert.alignment.layers), f"{expert.seed}/{number}/{expert.number}")
    return layerwise.RULES[rule](values)


def _reversed(expert: Measured, rule: str) -> Mapping[str, float]:
    return layerwise.RULES[rule]({layer: -value for layer, value in expert.alignment.values.items()})


def _by_norm(expert: Measured, rule: str) -> Mapping[str, float]:
    return layerwise.RULES[rule](layerwise.relative_norms(expert.alignment))


def _by_depth(expert: Measured, sign: int) -> Mapping[str, float]:
    return linear_drop_by_rank({layer: float(sign * index) for index, layer in enumerate(expert.alignment.layers)})


def _listed() -> dict[str, Streamed]:
    rules: tuple[Weighting, ...] = ("linear", "log", "threshold")
    found = {TASK_ARITHMETIC: Streamed(anchored=False), ANCHORED: Streamed(), "task arithmetic on instruct": Streamed(anchored=False)}
    found |= {f"LATA {rule}, {level}": Streamed(partial(lata, weighting=rule), level) for level in LEVELS for rule in rules}
    tables: dict[str, Callable[[Measured], Mapping[str, float]]] = {
        "blocks only": lambda expert: dict.fromkeys(expert.alignment.layers, 1.0)
    }
    by_rank: tuple[Weighting, ...] = ("linear", "log")
    for rule in by_rank:
        found[f"LATA {rule}, outside 1"] = Streamed(partial(lata, weighting=rule, outside=1.0))
        tables[f"by relative norm, {rule}"] = partial(_by_norm, rule=rule)
        tables |= {f"random {rule} {number}": partial(_random, rule=rule, number=number) for number in range(1, RANDOM_ROWS + 1)}
        tables[f"reversed {rule}"] = partial(_reversed, rule=rule)
    tables |= {"by depth, rising": partial(_by_depth, sign=-1), "by depth, falling": partial(_by_depth, sign=1)}
    found |= {name: Streamed(partial(by_layer, coefficients=table)) for name, table in tables.items()}
    values = {"sine of alignment": layerwise.sines, "1 − alignment": layerwise.distances}
    for name, rule_of in values.items():
        found[name] = Streamed(partial(by_layer, coefficients=partial(_from_alignment, values=rule_of), outside=1.0))
    return found


def _from_alignment(expert: Measured, values: Callable[[Alignment], Mapping[str, float]]) -> Mapping[str, float]:
    return values(expert.alignment)


STREAMED = _listed()
"""By the names of ``study.rules.METHODS``."""
PAPER = (
    TASK_ARITHMETIC,
    *(f"LATA {rule}, block" for rule in ("linear", "log", "threshold")),
    "blocks only",
    "by relative norm, linear",
    *(f"random linear {number}" for number in range(1, RANDOM_ROWS + 1)),
    "reversed linear",
)
"""What is run unless others are named: the published rules, and the controls that a gain has to stand against."""
