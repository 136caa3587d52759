"""The section about taking one expert off a merge of several."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.bench import table
from study.cells import DASH, Results, decisive, of_values
from study.removal import RESIDUAL, SCALES, WAYS


def section(results: Results) -> list[str]:
    """Lines of the page."""
    shown, said = decisive(results)
    lines = [
        "## Taking one expert off a merge",
        "",
        "Three experts from instruct were merged by regression at scale 1, and each is taken off in turn; figures are means over the three, in % of what "
        f"the experts themselves gain. A subtraction is at the first scale of {', '.join(f'{scale:g}' for scale in SCALES)} that leaves at most "
        f"{RESIDUAL:.0%} on validation.{said}",
    ]
    for name in shown[0]["settings"]:
        rows = []
        for way in WAYS:
            found = [[entry["ways"][way] for entry in result["settings"][name]] for result in shown]
            known = [reached for entries in found if (reached := [entry for entry in entries if entry is not None])]
            rows.append(
                [way, f"{sum(map(len, known))} of {sum(map(len, found))}", *(_mean(known, key) for key in ("left", "kept", "instruct"))]
            )
        heads = ["row", "reached", "left of it, %", "kept of the others, %", "instruct skills: exact match, %"]
        lines += ["", f"### {name}", "", f"{len(shown)} seeds.", "", *table(heads, rows)]
    return lines


def _mean(found: list[list[dict[str, Any]]], key: str) -> str:
    """Over the seeds, of the mean over the experts."""
    return of_values([100 * fmean(entry[key] for entry in entries) for entries in found]) if found else DASH
