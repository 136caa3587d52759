"""The section about the rows that every seed runs: at scale 1 and at the best scale against task arithmetic at its best, then setting by setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.bench import table
from study import merging_page
from study.cells import ANCHORED, DASH, LATA, TASK_ARITHMETIC, Results, as_text, grouped, split
from study.rules import REGRESSION, TOWARDS_SUM, WITHOUT_SAMPLES
from study.statistics import Interval, differences, holm, interval, paired_p_value, tells_apart

ROWS = (WITHOUT_SAMPLES, "TSV-M", REGRESSION, TOWARDS_SUM, ANCHORED, LATA)
"""The rows of the summary; task arithmetic is what they are compared with."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """A paired difference of one row in one setting.

    Attributes:
        gain: In points, over the seeds that both sides have.
        p_value: Two-sided, unadjusted; None where there is no spread, or one seed.
    """

    gain: Interval
    p_value: float | None


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figures are written to the folder."""
    settings = grouped(split(results)[0], merging_page.setting_of)
    return [
        "## Merging, the rows that every seed runs",
        "",
        "All models of these seeds were trained for this comparison, those of 0 to 4 once more: trained again, they do not score to the digit what those "
        "of the section on every row do. So differences are paired within this section only. Settings where task arithmetic "
        f"cannot tell methods apart ({DASH} in the first row) are shown all the same.",
        "",
        "**Nothing tuned**: each row at scale 1 minus task arithmetic at its own best scale, points on test; in brackets the number of seeds and the "
        "p-value, adjusted by Holm for the whole table; bold below 0.05.",
        "",
        *_summary(settings, "untuned", "test"),
        "",
        "**Nothing tuned on either side**: each row at scale 1 minus task arithmetic at scale 1.",
        "",
        *_summary(settings, "untuned", "untuned"),
        "",
        "**Each at its own best scale**, chosen on validation, minus task arithmetic at its own.",
        "",
        *_summary(settings, "test", "test"),
        "",
        *merging_page.by_setting(results, folder, link),
    ]


def differences_of(results: Results, row: str, own: str, reference: str) -> Difference | None:
    """A row's score under one key minus that of task arithmetic under another, in points; None where no seed has both."""
    pairs = {
        result["seed"]: (result["methods"][row], result["methods"][TASK_ARITHMETIC])
        for result in results
        if {row, TASK_ARITHMETIC} <= result["methods"].keys()
    }
    if not pairs:
        return None
    ours, theirs = ({seed: 100 * pair[side][key] for seed, pair in pairs.items()} for side, key in enumerate((own, reference)))
    gained = differences(ours, theirs)
    return Difference(interval(gained), paired_p_value(gained))


def _summary(settings: Mapping[str, Results], own: str, reference: str) -> list[str]:
    rows = [*ROWS, *([TASK_ARITHMETIC] if own != reference else [])]
    found = {
        (row, name): difference
        for row in rows
        for name, results in settings.items()
        if (difference := differences_of(results, row, own, reference)) is not None
    }
    adjusted = holm({f"{row}|{name}": each.p_value for (row, name), each in found.items() if each.p_value is not None})
    lines = [["task arithmetic can tell", *(_telling(results) for results in settings.values())]]
    for row in rows:
        cells = [_cell(found.get((row, name)), adjusted.get(f"{row}|{name}")) for name in settings]
        if any(cell != DASH for cell in cells):
            lines.append([row, *cells])
    return table(["row", *settings], lines)


def _telling(results: Results) -> str:
    kept = fmean(float(result["headroom"]) for result in results)
    return f"yes: keeps {100 * kept:.0f} %" if tells_apart(kept) else DASH


def _cell(found: Difference | None, p_value: float | None) -> str:
    if found is None:
        return DASH
    said = as_text(found.gain, signed=True)
    p = DASH if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
    strong = p_value is not None and p_value < SIGNIFICANT
    return f"{f'**{said}**' if strong else said} ({found.gain.count}; {p})"
