"""The section about what the callback saw: alignments over training, and whether anything predicts what merging loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.bench import table
from study import figures
from study.cells import DASH, Results, decisive, key_of, of_values
from study.real.prediction import Correlation, correlations


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Return the lines of the section; its figures are written to the folder."""
    shown, said = decisive(results)
    kinds = shown[0]["kinds"]
    maps = {f"{kind} fine-tuning": _mean_map(kinds[kind]["experts"]) for kind in kinds}
    first = next(iter(kinds["full"]["experts"].values()))["history"]
    path = figures.alignment_maps(
        maps, [row["step"] for row in first], "Alignment by block, mean over the experts", folder / "alignment-over-training.svg"
    )
    lines = [
        "## What the callback saw",
        "",
        f"![Alignment of each block over training, in full and with LoRA]({link}{path.name})",
        "",
        "Of the last measurement, on average over the seeds: alignment and norm relative to the instruction vector of the whole model, spread of the "
        "alignments of the blocks, and growth, the share of its final norm that the vector had half-way.",
    ]
    measures = ("alignment", "relative norm", "spread", "growth")
    rows = [
        [f"{name}, {kind}", *(_mean_of([result["kinds"][kind]["experts"][name][measure] for result in shown]) for measure in measures)]
        for kind in kinds
        for name in kinds[kind]["experts"]
    ]
    lines += ["", *table(["expert", *measures], rows), "", "### Does any of it predict what merging loses?", ""]
    lines += [
        "Rank correlation over the pairs of experts with the share of their gain that a merge loses, averaged over the seeds; 95 % intervals of "
        "drawing the "
        f"experts anew.{said}"
    ]
    for kind in kinds:
        found = correlations(shown, kind)
        if not found:
            lines += ["", f"{kind}: too few pairs."]
            continue
        names = list(dict.fromkeys(name for row in found.values() for name in row))
        cells = [[name, *(_correlation(row.get(name)) for row in found.values())] for name in names]
        lines += ["", *table([kind, *(f"lost by {lost}" for lost in found)], cells)]
        lines += ["", _answer(kind, found)]
        drawn = {name: row for name, row in next(iter(found.values())).items() if row.low is not None and row.high is not None}
        if drawn:
            path = figures.correlation_intervals(
                {name: (row.value, row.low, row.high) for name, row in drawn.items()},
                f"What is lost by {next(iter(found))}, {kind}",
                folder / f"prediction-{key_of(kind)}.svg",
            )
            lines += ["", f"![Rank correlations with what merging loses, {kind}]({link}{path.name})"]
    return lines


def _answer(kind: str, found: Mapping[str, Mapping[str, Correlation]]) -> str:
    """A sentence that says which predictors have an interval on one side of zero."""
    clear = [
        f"{name} ({lost})" for lost, row in found.items() for name, each in row.items() if each.low is not None and each.low * each.high > 0
    ]
    tried = sum(len(row) for row in found.values())
    if not clear:
        return f"{kind}: none of {tried} intervals excludes 0, so nothing that was measured predicts what merging loses."
    return f"{kind}: of {tried} intervals these exclude 0: {', '.join(clear)}. About {0.05 * tried:.1f} would by chance."


def _correlation(found: Correlation | None) -> str:
    if found is None:
        return DASH
    return f"{found.value:+.2f}" + ("" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]")


def _mean_map(experts: Mapping[str, Any]) -> list[list[float | None]]:
    """Alignment by block and measurement, on average over the experts, as far as the shortest history goes."""
    histories = [expert["history"] for expert in experts.values()]
    blocks = list(histories[0][0]["layers"])
    return [
        [_mean_or_none([row["layers"][block]["alignment"] for row in rows]) for rows in zip(*histories, strict=False)] for block in blocks
    ]


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_of(values: Sequence[float | None]) -> str:
    return of_values([value for value in values if value is not None] or None, ".4f")
