"""The section about merging: headroom of the settings, and for each of them its rows, its models and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.bench import table
from study import figures
from study.cells import (
    ANCHORED,
    DASH,
    TASK_ARITHMETIC,
    Result,
    Results,
    as_text,
    compared,
    decisive,
    drawn_rows,
    grouped,
    key_of,
    of_values,
    strong,
)
from study.real.scoring import INSTRUCTIONS, TEXT
from study.statistics import HEADROOM, Comparison, tells_apart

DRAWN = (TASK_ARITHMETIC, ANCHORED, "LATA linear, block", "lata regress", "lata regress without samples", "TSV-M")
_PROTOCOLS = {
    "plain": "from the model as it is, without an instruction vector",
    "instruct": "from an instruct tune of the model",
    "base": "from the model as the base of its instruct tune",
}


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Return the lines of the section; its figures are written to the folder."""
    lines = [
        "## Merging",
        "",
        "The score is the share of the experts' own gain in held-out loss that is kept, in %. The scale of a row is chosen on validation from one grid; "
        f"*untuned* is scale 1. A setting can tell methods apart where task arithmetic keeps {100 * HEADROOM[0]:.0f} to {100 * HEADROOM[1]:.0f} "
        "%. Facts of "
        "TOFU are scored on the rows that were trained, everything else on rows that were not.",
        "",
    ]
    settings = grouped(results, _setting)
    heads = ["setting", "seeds", "task arithmetic keeps, %", "can tell methods apart"]
    rows = []
    for name, found in settings.items():
        shown, _ = decisive(found)
        kept = [100 * result["headroom"] for result in shown if result["headroom"] is not None]
        rows.append([name, str(len(shown)), of_values(kept), "yes" if kept and tells_apart(fmean(kept) / 100) else "no"])
    lines += table(heads, rows)
    for name, found in settings.items():
        shown, said = decisive(found)
        lines += ["", f"### {name}", "", *_rows(shown), "", *_models(shown)]
        path = figures.scale_curves(_curves(shown), name, folder / f"curves-{key_of(name)[:80]}.svg", "validation: gain kept, %")
        lines += ["", f"![Validation score by scale: {name}]({link}{path.name})"]
        lines += ["", said.strip()] if said else []
    return lines


def _setting(result: Result) -> str:
    setting = result["setting"]
    adapters = "LoRA " if setting["adapters"] else ""
    return f"{adapters}{', '.join(setting['experts'])}: {_PROTOCOLS[setting['protocol']]}"


def _rows(results: Results) -> list[str]:
    """All rows of a setting that every seed has, best first."""
    common = set.intersection(*(set(result["methods"]) for result in results))
    scores = {
        name: {result["seed"]: 100 * result["methods"][name]["test"] for result in results}
        for name in results[0]["methods"]
        if name in common
    }
    found = compared(scores, TASK_ARITHMETIC)
    if TASK_ARITHMETIC not in scores or not tells_apart(fmean(result["headroom"] for result in results)):
        found = {name: replace(row, verdict=None) for name, row in found.items()}
    heads = [
        "row",
        "kind",
        "test: gain kept, %",
        "− task arithmetic",
        "− random",
        "scale",
        "untuned",
        "instructions, nats",
        "text, nats",
        "verdict",
    ]
    return table(heads, [_line(name, row, results) for name, row in found.items()])


def _line(name: str, row: Comparison, results: Results) -> list[str]:
    judged = [as_text(row.score), as_text(row.against_task_arithmetic, signed=True), as_text(row.against_random, signed=True)]
    if name not in results[0]["methods"]:
        return [name, "control", *judged, *[DASH] * 5]
    methods = [result["methods"][name] for result in results]
    return [
        strong(name, row),
        methods[0]["kind"] + (", tuned" if methods[0]["tuned"] else ""),
        *judged,
        f"{median(method['scale'] for method in methods):g}",
        of_values([100 * method["untuned"] for method in methods]),
        *(of_values([method["test_details"][other]["loss"] for method in methods], ".3f") for other in (INSTRUCTIONS, TEXT)),
        row.verdict or DASH,
    ]


def _models(results: Results) -> list[str]:
    """Losses and exact match of start and experts on test, and of the rows that are drawn."""
    first = results[0]
    columns = list(first["reference"]["start"])
    rows: dict[str, list[Mapping[str, Any]]] = {"start": [result["reference"]["start"] for result in results]}
    rows |= {f"expert: {name}": [result["reference"]["experts"][name] for result in results] for name in first["setting"]["experts"]}
    for name in DRAWN:
        found = [result["methods"][name]["test_details"] for result in results if name in result["methods"]]
        rows |= {name: found} if len(found) == len(results) else {}
    lines = [[label, *(_loss_and_match([each[column] for each in found]) for column in columns)] for label, found in rows.items()]
    return [
        "Loss on test in nats per token, and in brackets exact match in % where answers are short:",
        "",
        *table(["model", *columns], lines),
    ]


def _loss_and_match(scores: Sequence[Mapping[str, Any]]) -> str:
    loss = of_values([score["loss"] for score in scores], ".3f")
    exact = [score["exact"] for score in scores if score["exact"] is not None]
    return f"{loss} ({100 * fmean(exact):.0f})" if exact else loss


def _curves(results: Results) -> dict[str, dict[float, list[float]]]:
    names = set.intersection(*(set(result["methods"]) for result in results))
    shown = drawn_rows(DRAWN, [name for name in results[0]["methods"] if name in names])
    scales = next(iter(results[0]["methods"].values()))["validation"]
    return {
        label: {
            float(scale): [100 * fmean(result["methods"][name]["validation"][scale] for name in group) for result in results]
            for scale in scales
        }
        for label, group in shown.items()
    }
