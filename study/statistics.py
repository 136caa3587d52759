"""Means over seeds with their intervals, paired differences, and the rule by which a method wins; fixed before anything was run.

A method wins in a setting if, over at least five seeds, the 95 % intervals of its paired differences to task arithmetic and to the mean of random ranks
both lie above 0. It loses if that to task arithmetic lies below 0. Everything else is not separated. Intervals are those of the t distribution; a
p-value adjusted for the number of methods (Holm) is given for information and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from lata_lightning.errors import LataError, first_three

LEVEL = 0.95
FEWEST_SEEDS = 5
FIRST_DEVELOPMENT_SEED = 100
"""Seeds from here on serve to choose candidates, and decide nothing."""
HEADROOM = (0.60, 0.85)
"""Share of the experts' own gain that tuned task arithmetic has to keep for a setting to tell methods apart."""
_ROUNDING = 1e-12
Verdict = Literal["wins", "loses", "not separated"]
Scores = Mapping[int, float]
"""Score by seed."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        half_width: Of the 95 % interval of the t distribution; None with one value.
        count: Number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        """The lower end; −∞ with one value."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end; ∞ with one value."""
        return math.inf if self.half_width is None else self.mean + self.half_width


@dataclass(frozen=True)
class Comparison:
    """One method in one setting.

    Attributes:
        score: Over the seeds.
        against_task_arithmetic, against_random: Paired differences to task arithmetic, and to the mean of the random ranks; None where these were not run.
        verdict: By the decision rule; None for what it is judged by, and where there are too few seeds.
        p_value: Of the paired t-test against task arithmetic, two-sided, as it is; None where there is no spread, or one seed.
    """

    score: Interval
    against_task_arithmetic: Interval | None
    against_random: Interval | None
    verdict: Verdict | None
    p_value: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and half the width of its 95 % t interval.

    Raises:
        LataError: There are no values, or one is not finite.
    """
    if not values:
        raise LataError("there is no value to take the mean of: run at least one seed")
    odd = [str(value) for value in values if not math.isfinite(value)]
    if odd:
        raise LataError(f"scores must be finite numbers; others are {first_three(odd)}")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count), count)


def differences(scores: Scores, reference: Scores) -> list[float]:
    """Score − reference, seed by seed, in the order of the seeds.

    Raises:
        LataError: The seeds are not the same.
    """
    lone = set(scores) ^ set(reference)
    if lone:
        raise LataError(
            f"paired differences need the same seeds on both sides; on one side only are {first_three(map(str, lone))}. Run them all."
        )
    return [scores[seed] - reference[seed] for seed in sorted(scores)]


def mean_by_seed(rows: Sequence[Scores]) -> dict[int, float]:
    """Mean over several rows, seed by seed, for the seeds that all of them have."""
    common = set.intersection(*(set(row) for row in rows)) if rows else set()
    return {seed: math.fsum(row[seed] for row in rows) / len(rows) for seed in sorted(common)}


def decide(against_task_arithmetic: Interval, against_random: Interval) -> Verdict | None:
    """The decision rule of this module; None with fewer than five seeds."""
    if min(against_task_arithmetic.count, against_random.count) < FEWEST_SEEDS:
        return None
    if against_task_arithmetic.low > 0 and against_random.low > 0:
        return "wins"
    return "loses" if against_task_arithmetic.high < 0 else "not separated"


def paired_p_value(values: Sequence[float]) -> float | None:
    """Two-sided p of the t-test that the mean difference is 0; None with one value, or where all values are equal but for rounding."""
    found = interval(values)
    if found.half_width is None or max(values) - min(values) <= _ROUNDING * max(map(abs, values)):
        return None
    # The half width is a quantile of t times the standard error.
    statistic = found.mean / found.half_width * stats.t.ppf((1 + LEVEL) / 2, found.count - 1)
    return float(2 * stats.t.sf(abs(statistic), found.count - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number by Holm's step-down procedure, in the order given.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65–70.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compare(scores: Mapping[str, Scores], task_arithmetic: str, random_ranks: Callable[[str], Sequence[str]]) -> dict[str, Comparison]:
    """Every method of a setting against task arithmetic and against the mean of its random ranks, each over the seeds that both sides have.

    Args:
        scores: By method, then by seed.
        task_arithmetic: Its name among them; where it is missing, nothing is compared with it.
        random_ranks: From a method to the names of the random rows it is judged by; the mean over those that are there is taken, seed by seed.

    Raises:
        LataError: A score is not finite.
    """
    found = {}
    for name, row in scores.items():
        against, against_chance, verdict, p_value = None, None, None, None
        drawn = [scores[each] for each in random_ranks(name) if each in scores]
        if task_arithmetic in scores and name != task_arithmetic and (gained := _on_common_seeds(row, scores[task_arithmetic])):
            against, p_value = interval(gained), paired_p_value(gained)
        if drawn and name not in random_ranks(name) and (gained := _on_common_seeds(row, mean_by_seed(drawn))):
            against_chance = interval(gained)
        if against is not None and against_chance is not None:
            verdict = decide(against, against_chance)
        found[name] = Comparison(interval(list(row.values())), against, against_chance, verdict, p_value)
    return found


def _on_common_seeds(row: Scores, reference: Scores) -> list[float]:
    """Paired differences over the seeds that both sides have."""
    common = row.keys() & reference.keys()
    return differences({seed: row[seed] for seed in common}, {seed: reference[seed] for seed in common})


def tells_apart(headroom: float) -> bool:
    """Whether the share of the experts' gain that tuned task arithmetic keeps leaves room between it and the experts, and is not lost either."""
    return HEADROOM[0] <= headroom <= HEADROOM[1]
