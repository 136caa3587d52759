"""The section about continual learning: the usual figures after the last task, and the accuracy after every task with its verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.bench import table
from study import figures
from study.cells import (
    DASH,
    TASK_ARITHMETIC,
    Result,
    Results,
    as_text,
    compared,
    decisive,
    drawn_rows,
    is_random,
    of_values,
    random_groups,
)
from study.statistics import Comparison, tells_apart

_MEASURES = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
_DRAWN = (
    "sequential fine-tuning",
    "sequential fine-tuning with replay",
    "MagMax",
    TASK_ARITHMETIC,
    "LATA linear, block",
    "lata regress",
    "lata regress without samples",
)


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figure is written to the folder."""
    shown, said = decisive(results)
    first = shown[0]
    names = dict.fromkeys(name for result in shown for name in result["methods"])
    rows = {name: [name] for name in names if not is_random(name)} | random_groups(names)
    stages = range(1, len(first["tasks"]) + 1)
    curves = {
        label: {stage: [fmean(_accuracy(result, name, stage) for name in group) for result in having(shown, group)] for stage in stages}
        for label, group in drawn_rows(_DRAWN, names).items()
    }
    path = figures.stage_curves(curves, "Continual learning", folder / "continual.svg")
    alone = of_values([100 * fmean(result["alone"]) for result in shown])
    return [
        "## Continual learning",
        "",
        f"Tasks in order: {', '.join(first['tasks'])}; {len(shown)} seeds. Each task's own fine-tune from the start scores {alone} % on it, on average. "
        "The usual figures after the last task, on test: accuracies in %, transfer and forgetting in points; 'instruct' is the instruct skills "
        f"then.{said}",
        "",
        *_at_the_end(shown, rows),
        "",
        "Accuracy on the tasks learned so far, on average in %, after each task; in brackets the difference to task arithmetic, and the verdict "
        "where task arithmetic can tell methods apart.",
        "",
        *_by_stage(shown, rows, stages[1:]),
        "",
        f"![Accuracy on the tasks learned so far]({link}{path.name})",
    ]


def having(results: Results, group: Sequence[str]) -> list[Result]:
    """The results that have all rows of a group."""
    return [result for result in results if result["methods"].keys() >= set(group)]


def _at_the_end(results: Results, rows: Mapping[str, Sequence[str]]) -> list[str]:
    values: list[Callable[[Result, str], float | None]] = [
        *(lambda result, name, measure=measure: result["methods"][name][measure] for measure in _MEASURES),
        lambda result, name: result["methods"][name]["instruct"][-1],
    ]
    lines = []
    for label, group in rows.items():
        found = having(results, group)
        kind = found[0]["methods"][group[0]]["kind"]
        lines.append([label, kind, str(len(found)), *(_mean(found, group, value) for value in values)])
    return table(["row", "kind", "seeds", *(measure.replace("_", " ") for measure in _MEASURES), "instruct"], lines)


def _mean(results: Results, group: Sequence[str], value: Callable[[Result, str], float | None]) -> str:
    """Over the seeds, of the mean of a group of rows; a dash where there is no value."""
    by_seed = [[found for name in group if (found := value(result, name)) is not None] for result in results]
    return of_values([100 * fmean(found) for found in by_seed if found])


def _by_stage(results: Results, rows: Mapping[str, Sequence[str]], stages: Sequence[int]) -> list[str]:
    names = list(dict.fromkeys(name for group in rows.values() for name in group))
    kept = {stage: fmean(_kept(result, stage) for result in results) for stage in stages} if TASK_ARITHMETIC in names else {}
    judged = {
        stage: compared(
            {name: {result["seed"]: 100 * _accuracy(result, name, stage) for result in having(results, [name])} for name in names},
            TASK_ARITHMETIC,
        )
        for stage in stages
    }
    lines = [[label, *(_cell(judged[stage][label], kept.get(stage, 0.0)) for stage in stages)] for label in rows]
    heads = ["row", *(f"{stage} tasks" for stage in stages)]
    shares = ["task arithmetic keeps of the gain, %", *(f"{100 * kept[stage]:.0f}" if kept else DASH for stage in stages)]
    return table(heads, [shares, *lines])


def _cell(row: Comparison, kept: float) -> str:
    if row.against_task_arithmetic is None:
        return as_text(row.score)
    verdict = f", {row.verdict}" if row.verdict and tells_apart(kept) else ""
    return f"{as_text(row.score)} ({as_text(row.against_task_arithmetic, signed=True)}{verdict})"


def _accuracy(result: Result, name: str, stage: int) -> float:
    """On the tasks learned by a stage, on average over them."""
    return fmean(result["methods"][name]["matrix"][stage - 1][:stage])


def _kept(result: Result, stage: int) -> float:
    """Share of what the fine-tunes on single tasks gain over their start that task arithmetic keeps after some tasks, on average over these."""
    after = result["methods"][TASK_ARITHMETIC]["matrix"][stage - 1][:stage]
    return fmean(
        (score - start) / (alone - start) for score, start, alone in zip(after, result["reference"], result["alone"], strict=False)
    )
