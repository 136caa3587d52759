"""What the sections of the page share: which seeds decide, which rows are random, and how numbers are written."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from study.statistics import FIRST_DEVELOPMENT_SEED, Comparison, Interval, Scores, compare, interval, mean_by_seed

DASH = "–"
TASK_ARITHMETIC, ANCHORED, LATA = "task arithmetic", "task arithmetic, anchored", "LATA linear, block"
"""Rows that stand in figures and comparisons, as they are called in the results."""
Result = Mapping[str, Any]
Results = Sequence[Result]
_RANDOM = re.compile(r"random( \w+)? \d+")
_LOG = re.compile(r"\blog\b")


def split(results: Results) -> tuple[list[Result], list[Result]]:
    """Results of the seeds that decide, and of development seeds, by seed."""
    ordered = sorted(results, key=lambda result: result["seed"])
    final = [result for result in ordered if result["seed"] < FIRST_DEVELOPMENT_SEED]
    return final, ordered[len(final) :]


def decisive(results: Results) -> tuple[list[Result], str]:
    """The results to show where there is no room for both, and what to say of them."""
    final, development = split(results)
    said = "" if final else " These are development seeds, which decide nothing."
    return (final or development), said


def grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    """Results by what a function gives for them, in the order in which they come."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        found[key(result)].append(result)
    return dict(found)


def onto_same_model(rows: Collection[str]) -> str:
    """The row of task arithmetic onto the model that LATA's rows go onto, which is instruct whatever experts start from."""
    return ANCHORED if ANCHORED in rows else TASK_ARITHMETIC


def is_random(name: str) -> bool:
    """Whether a row is one of the random rank orders, which are shown as their mean."""
    return _RANDOM.fullmatch(name) is not None


def random_rows(name: str, names: Iterable[str]) -> list[str]:
    """The random rows that a row is judged by: those under the log rule if its name says log and there are any, else the others."""
    drawn = [each for each in names if is_random(each)]
    under_log = [each for each in drawn if _LOG.search(each)]
    return under_log if under_log and _LOG.search(name) else [each for each in drawn if each not in under_log]


def drawn_rows(wanted: Iterable[str], names: Collection[str]) -> dict[str, list[str]]:
    """The lines of a figure, each with the rows that it is the mean of: those that are wanted and there, and random ranks under the linear rule."""
    shown = {name: [name] for name in wanted if name in names}
    chance = random_rows("linear", names)
    return shown | ({"random ranks, linear": chance} if chance else {})


def random_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The random rows by the rule they were drawn under, each group under the name that its mean is shown by."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := _RANDOM.fullmatch(name):
            found[f"random ranks{',' if match[1] else ''}{match[1] or ''}"].append(name)
    return {f"{label}, mean of {len(rows)}": rows for label, rows in found.items()}


def compared(scores: Mapping[str, Scores], reference: str) -> dict[str, Comparison]:
    """Every row against a reference and against random ranks, which stand there as their mean; the best first. Development seeds give no verdict."""
    means = {label: mean_by_seed([scores[row] for row in rows]) for label, rows in random_groups(scores).items()}
    found = compare({**scores, **means}, reference, lambda name: () if name in means else random_rows(name, scores))
    if any(seed >= FIRST_DEVELOPMENT_SEED for row in scores.values() for seed in row):
        found = {name: replace(row, verdict=None) for name, row in found.items()}
    return {name: row for name, row in sorted(found.items(), key=lambda item: -item[1].score.mean) if not is_random(name)}


def key_of(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def strong(name: str, row: Comparison | None) -> str:
    """The name of a row, bold where it wins."""
    return f"**{name}**" if row is not None and row.verdict == "wins" else name


def of_values(values: Sequence[float] | None, form: str = ".1f") -> str:
    """Mean and interval of values; a dash for none."""
    return as_text(interval(values), form=form) if values else DASH


def as_text(found: Interval | None, *, signed: bool = False, form: str = ".1f") -> str:
    """Mean and interval as text; a dash for none."""
    if found is None:
        return DASH
    mean = format(found.mean, ("+" if signed else "") + form)
    return mean if found.half_width is None else f"{mean} ± {format(found.half_width, form)}"
