"""The section about heterogeneity: the spread of the alignments in models of several sizes, and what LATA gains in them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

from scipy.stats import spearmanr

from benchmarks.bench import table
from study import figures
from study.cells import ANCHORED, DASH, LATA, TASK_ARITHMETIC, Results, as_text, decisive, grouped, of_values, onto_same_model
from study.heterogeneity import AT_ONE
from study.statistics import interval, tells_apart

_FEWEST = 3
"""Models in which a rank correlation says anything."""


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figure is written to the folder."""
    shown, said = decisive(results)
    by_model = grouped((row for result in shown for row in result["rows"]), lambda row: str(row["name"]))
    title = "Spread of the alignments and what LATA gains"
    points = {name: list(zip([row["spread"] for row in found], _gains(found, LATA, None), strict=True)) for name, found in by_model.items()}
    path = figures.spread_against_gain(points, title, "LATA linear − task arithmetic, points", folder / "heterogeneity.svg")
    heads = ["models", "seeds", "spread of alignments", "rank correlation of alignment with −ρ", "task arithmetic keeps, %"]
    heads += [f"LATA linear − {name}" for name in ("task arithmetic", "blocks only", "random")]
    heads += ["the same, outside 1, − task arithmetic", "scale of LATA linear", "without samples at scale 1 − task arithmetic"]
    return [
        "## Heterogeneity",
        "",
        "Does a wider spread of the alignments make LATA gain more? Gains are in points on test, over task arithmetic onto the same model "
        "(where experts start from base, onto instruct as LATA's are). *Blocks only* has all coefficients 1, and random ranks are LATA's coefficients "
        "in another order: what the ranking adds is the difference to them. At scale 0 nothing is merged, because no scale of the grid is better on "
        f"validation.{said}",
        "",
        *table(heads, [_line(name, found) for name, found in by_model.items()]),
        "",
        *_trends(shown),
        *_left_out(shown),
        f"![{title}, by models]({link}{path.name})",
    ]


def _line(name: str, found: Results) -> list[str]:
    ranks, kept = ([row[key] for row in found] for key in ("rank_correlation", "headroom"))
    outside = "" if tells_apart(fmean(kept)) else " (outside)"
    measured = [
        of_values([row["spread"] for row in found], ".3f"),
        of_values(ranks, ".2f"),
        of_values([100 * share for share in kept]) + outside,
    ]
    against = [_gains(found, LATA, reference) for reference in (None, "blocks only", "random")]
    gains = [as_text(interval(values), signed=True) for values in (*against, _gains(found, "LATA linear, outside 1", None))]
    # Onto the start of the experts, as the merge without samples goes there.
    whole = [100 * (row["scores"][AT_ONE] - row["scores"][TASK_ARITHMETIC]) for row in found if AT_ONE in row["scores"]]
    last = f"{as_text(interval(whole), signed=True)} ({len(whole)})" if whole else DASH
    return [name, str(len(found)), *measured, *gains, f"{median(row['methods'][LATA]['scale'] for row in found):g}", last]


def _gains(found: Results, name: str, reference: str | None) -> list[float]:
    """Scores of a row less those of another one, of task arithmetic onto the same model unless one is named, in points."""
    every = [row["scores"] for row in found]
    return [100 * (scores[name] - scores[reference or onto_same_model(scores)]) for scores in every]


def _trends(results: Results) -> list[str]:
    """Rank correlations over the models of a seed: the models of all seeds together would count one seed's luck several times."""
    said = []
    for name, onto_instruct in (("experts from instruct", False), ("experts from base", True)):
        for against, reference in (("task arithmetic", None), ("random ranks", "random")):
            found = [
                value
                for result in results
                if (value := _trend([row for row in result["rows"] if (ANCHORED in row["scores"]) == onto_instruct], reference)) is not None
            ]
            if found:
                said.append(f"{as_text(interval(found), signed=True, form='.2f')} over {against} with {name}")
    if not said:
        return []
    return ["Spearman correlation of spread and gain over the models of a seed, mean of the seeds: " + "; ".join(said) + ".", ""]


def _trend(rows: Results, reference: str | None) -> float | None:
    if len(rows) < _FEWEST:
        return None
    spreads, gains = [row["spread"] for row in rows], _gains(rows, LATA, reference)
    if len(set(spreads)) == 1 or len(set(gains)) == 1:
        return None
    return float(spearmanr(spreads, gains).statistic)


def _left_out(results: Results) -> list[str]:
    """Models that learned too little to be merged, by seed and with the reason."""
    lines = [f"- Seed {result['seed']}, {name}: {why}" for result in results for name, why in result.get("left_out", {}).items()]
    return ["Left out:", "", *lines, ""] if lines else []
