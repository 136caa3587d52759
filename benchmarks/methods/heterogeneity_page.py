"""The section about heterogeneity: the spread of the alignments in models of several sizes, and what LATA gains in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from scipy.stats import spearmanr

from benchmarks.bench import table
from benchmarks.methods import figures
from benchmarks.methods.cells import ANCHORED, LATA, TASK_ARITHMETIC, Result, Results, as_text, decisive, grouped, of_values
from benchmarks.methods.statistics import interval, tells_apart

_FEWEST = 3
"""Models in which a rank correlation says anything."""


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figure is written to the folder."""
    shown, said = decisive(results)
    by_model = grouped((row for result in shown for row in result["rows"]), lambda row: str(row["name"]))
    title = "Spread of the alignments and what LATA gains"
    points = {name: [_spread_and_gain(row) for row in found] for name, found in by_model.items()}
    path = figures.spread_against_gain(points, title, "LATA linear − task arithmetic, points", folder / "heterogeneity.svg")
    heads = ["models", "seeds", "spread of alignments", "rank correlation of alignment with −ρ", "task arithmetic keeps, %"]
    heads += ["LATA linear − task arithmetic", "LATA linear − random"]
    return [
        "## Heterogeneity",
        "",
        "Does a wider spread of the alignments make LATA gain more? Gains are in points on test, over task arithmetic onto the same model "
        f"(where experts start from base, onto instruct as LATA's are).{said}",
        "",
        *table(heads, [_line(name, found) for name, found in by_model.items()]),
        "",
        *_trends(shown),
        *_left_out(shown),
        f"![{title}, by models]({link}{path.name})",
    ]


def _line(name: str, found: Results) -> list[str]:
    spreads, against = zip(*(_spread_and_gain(row) for row in found), strict=True)
    chance = [100 * (row["scores"][LATA] - row["scores"]["random"]) for row in found]
    ranks, kept = ([row[key] for row in found] for key in ("rank_correlation", "headroom"))
    outside = "" if tells_apart(fmean(kept)) else " (outside)"
    measured = [of_values(spreads, ".3f"), of_values(ranks, ".2f"), of_values([100 * share for share in kept]) + outside]
    return [name, str(len(found)), *measured, *(as_text(interval(gains), signed=True) for gains in (against, chance))]


def _spread_and_gain(row: Result) -> tuple[float, float]:
    """Spread of the alignments, and LATA's score less that of task arithmetic onto the same model, in points."""
    scores = row["scores"]
    return row["spread"], 100 * (scores[LATA] - scores.get(ANCHORED, scores[TASK_ARITHMETIC]))


def _trends(results: Results) -> list[str]:
    """Rank correlations over the models of a seed: the models of all seeds together would count one seed's luck several times."""
    parts = {
        "experts from instruct": [[row for row in result["rows"] if ANCHORED not in row["scores"]] for result in results],
        "experts from base": [[row for row in result["rows"] if ANCHORED in row["scores"]] for result in results],
    }
    said = []
    for name, seeds in parts.items():
        found = [value for value in map(_trend, seeds) if value is not None]
        if found:
            said.append(f"{as_text(interval(found), signed=True, form='.2f')} with {name}")
    if not said:
        return []
    return ["Spearman correlation of spread and gain over the models of a seed, mean of the seeds: " + ", ".join(said) + ".", ""]


def _trend(rows: Sequence[Result]) -> float | None:
    if len(rows) < _FEWEST:
        return None
    spreads, gains = zip(*map(_spread_and_gain, rows), strict=True)
    if len(set(spreads)) == 1 or len(set(gains)) == 1:
        return None
    return float(spearmanr(spreads, gains).statistic)


def _left_out(results: Results) -> list[str]:
    """Models that learned too little to be merged, by seed and with the reason."""
    lines = [f"- Seed {result['seed']}, {name}: {why}" for result in results for name, why in result.get("left_out", {}).items()]
    return ["Left out:", "", *lines, ""] if lines else []
