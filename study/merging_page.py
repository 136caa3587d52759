"""The section about merging: headroom of the settings, and for each of them its models, its rows, its figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from benchmarks.bench import table
from study import figures
from study.cells import (
    ANCHORED,
    DASH,
    LATA,
    TASK_ARITHMETIC,
    Result,
    Results,
    as_text,
    compared,
    decisive,
    drawn_rows,
    grouped,
    is_random,
    key_of,
    of_values,
    onto_same_model,
    split,
    strong,
)
from study.statistics import Comparison, holm, interval, tells_apart

_DRAWN = (TASK_ARITHMETIC, ANCHORED, LATA, "LATA log, block")
_BY_TASK = (*_DRAWN, "TSV-M", "lata regress", "lata regress without samples")


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figures are written to the folder."""
    return ["## Merging, every row", "", *by_setting(results, folder, link)]


def by_setting(results: Results, folder: Path, link: str) -> list[str]:
    """Headroom of the settings, then each of them: its models, its rows, its figure; last the spread of the alignments."""
    lines = _headroom(results)
    gains: dict[str, list[tuple[float, float]]] = {}
    for name, found in grouped(results, setting_of).items():
        final, development = split(found)
        lines += ["", f"### {name[0].upper()}{name[1:]}", "", *_models(final or development)]
        if final:
            lines += ["", *_rows(final), "", *_by_task(final)]
        if development:
            seeds = ", ".join(str(result["seed"]) for result in development)
            lines += [
                "",
                f"On the development seeds {seeds}, from which candidates were chosen and which decide nothing:",
                "",
                *_rows(development),
                "",
                *_by_task(development),
            ]
        shown, said = decisive(found)
        path = figures.scale_curves(_curves(shown), name, folder / f"curves-{key_of(name)}.svg", _unit(shown[0], "validation"))
        lines += ["", f"![Validation score by scale: {name}]({link}{path.name})"]
        if said:
            lines += ["", said.strip()]
        gains[name] = spread_and_gain(shown)
    gains = {name: pairs for name, pairs in gains.items() if pairs}
    if gains:
        path = figures.spread_against_gain(
            gains, "Spread of the alignments and what LATA gains", "LATA linear − task arithmetic, points", folder / "spread-and-gain.svg"
        )
        lines += [
            "",
            "### Spread of the alignments",
            "",
            "One point a seed; task arithmetic is that from instruct, as LATA's is.",
            "",
            f"![Spread of the alignments against LATA's gain]({link}{path.name})",
        ]
    return lines


def setting_of(result: Result) -> str:
    """What a setting is called on the page."""
    setting = result["setting"]
    adapters = f" by LoRA of rank {setting['rank']}" if setting.get("rank") else ""
    return f"{setting['track']}, experts from {setting['protocol']}{adapters}: {', '.join(setting['experts'])}"


def _unit(result: Result, split_name: str) -> str:
    text = result["setting"]["track"] == "text"
    return f"{split_name}: gain kept, %" if text else f"{split_name}: exact match, %"


def _headroom(results: Results) -> list[str]:
    rows = []
    for name, found in grouped(results, setting_of).items():
        final, development = split(found)
        kept = interval([100 * result["headroom"] for result in final or development])
        seeds = str(len(final)) if final else f"{len(development)} (development)"
        rows.append([name, seeds, as_text(kept), "yes" if tells_apart(kept.mean / 100) else "no"])
    return table(["setting", "seeds", "task arithmetic keeps of the experts' gain, %", "can tell methods apart"], rows)


def _models(results: Results) -> list[str]:
    """Test scores of what is merged, before it is."""
    first = results[0]["reference"]
    models = {
        "start of the experts": ("start",),
        "instruct": ("instruct",),
        **{f"expert: {task}": ("experts", task) for task in first["experts"]},
    }
    rows = []
    for label, (key, *task) in models.items():
        found = [result["reference"][key][task[0]] if task else result["reference"][key] for result in results]
        text = results[0]["setting"]["track"] == "text"
        cells = []
        for column in first["start"]:
            # Losses and perplexity as they are, exact match in %.
            raw = column == "base perplexity" or (text and column != "instruct")
            values = [each[column] for each in found]
            cells.append(of_values(values, ".3f") if raw else of_values([100 * value for value in values]))
        rows.append([label, *cells])
    unit = "loss in nats per byte; instruct skills in %" if results[0]["setting"]["track"] == "text" else "exact match in %"
    return [f"Before merging, on test ({unit}; {len(results)} seeds):", "", *table(["model", *first["start"]], rows)]


def _rows(results: Results) -> list[str]:
    """All rows of a setting, best first, each compared over the seeds that it shares with task arithmetic."""
    tests = _percent(results, "test")
    found = compared(tests, TASK_ARITHMETIC)
    if not tells_apart(fmean(result["headroom"] for result in results)):
        found = {name: replace(row, verdict=None) for name, row in found.items()}
    anchored = compared(tests, ANCHORED) if ANCHORED in tests else {}
    adjusted = holm({name: row.p_value for name, row in found.items() if row.p_value is not None and name in tests})
    heads = ["row", "kind", "seeds", _unit(results[0], "test"), "− task arithmetic", *(["− anchored"] if anchored else []), "− random"]
    lines = [_line(name, row, anchored.get(name), results, adjusted.get(name)) for name, row in found.items()]
    if not anchored:
        lines = [[*line[:5], *line[6:]] for line in lines]
    return table([*heads, "scale", "untuned", "p (Holm)", "verdict"], lines)


def _line(name: str, row: Comparison, anchored: Comparison | None, results: Results, p_value: float | None) -> list[str]:
    judged = [
        str(row.score.count),
        as_text(row.score),
        as_text(row.against_task_arithmetic, signed=True),
        as_text(anchored.against_task_arithmetic if anchored else None, signed=True),
        as_text(row.against_random, signed=True),
    ]
    methods = [result["methods"][name] for result in results if name in result["methods"]]
    if not methods:
        return [name, "control", *judged, *[DASH] * 4]
    return [
        strong(name, row),
        methods[0]["kind"] + (", tuned" if methods[0].get("tuned") else ""),
        *judged,
        _scale([method["scale"] for method in methods], methods[0]["validation"]),
        of_values([100 * method["untuned"] for method in methods]),
        DASH if p_value is None else f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001",
        row.verdict or DASH,
    ]


def _by_task(results: Results) -> list[str]:
    """What the mean of the score is made of, for the rows that are spoken of, on test at the chosen scale."""
    experts = results[0]["setting"]["experts"]
    rows = []
    for name in _BY_TASK:
        found = [result["methods"][name] for result in results if name in result["methods"]]
        if len(found) == len(results):
            details = [row["test_details"] for row in found]
            kept = [of_values([100 * row["test_kept"][task] for row in found]) for task in experts]
            instruct = of_values([100 * each["instruct"] for each in details])
            rows.append([name, *kept, instruct, of_values([each["base perplexity"] for each in details], ".2f")])
    heads = ["row", *(f"{task}: gain kept, %" for task in experts), "instruct skills: exact match, %", "base perplexity"]
    return ["By task, on test at the chosen scale:", "", *table(heads, rows)]


def _percent(results: Results, key: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for result in results:
        for name, row in result["methods"].items():
            found.setdefault(name, {})[result["seed"]] = 100 * row[key]
    return found


def _scale(scales: Sequence[float], grid: Iterable[str]) -> str:
    """The median of the scales that were chosen; marked where one of them is the largest of the grid, so that a better one may lie beyond."""
    return f"{median(scales):g}" + (" (end of grid)" if max(scales) >= max(map(float, grid)) else "")


def _curves(results: Results) -> dict[str, dict[float, list[float]]]:
    """The lines of a figure: what everything is compared with, LATA, random ranks, and the best row that is none of these."""
    tests = {name: scores for name, scores in _percent(results, "test").items() if len(scores) == len(results)}
    others = [name for name in tests if name not in _DRAWN and not is_random(name)]
    best = [max(others, key=lambda name: sum(tests[name].values()))] if others else []
    shown = drawn_rows([*_DRAWN, *best], tests)
    return {label: _curve(results, names) for label, names in shown.items()}


def _curve(results: Results, names: Sequence[str]) -> dict[float, list[float]]:
    """By scale the validation score of each seed, in %, meaned over some rows."""
    scales: Mapping[str, float] = results[0]["methods"][names[0]]["validation"]
    return {
        float(scale): [100 * sum(result["methods"][name]["validation"][scale] for name in names) / len(names) for result in results]
        for scale in scales
    }


def spread_and_gain(results: Results) -> list[tuple[float, float]]:
    """By seed the spread of the alignments, meaned over the experts, and LATA's test score minus that of task arithmetic onto the same model."""
    pairs = []
    for result in results:
        rows = result["methods"]
        reference = onto_same_model(rows)
        if {reference, LATA} <= rows.keys():
            spreads = result["spread"]["block"]
            pairs.append((sum(spreads) / len(spreads), 100 * (rows[LATA]["test"] - rows[reference]["test"])))
    return pairs
