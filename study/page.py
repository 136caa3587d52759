"""The page of the evidence, made from the results of every seed: tables, verdicts and figures.

Seeds from 100 on are for development: candidates are chosen by them, and they decide nothing. Rows that not every seed has run are
shown with the number of those that have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from study import continual_page, first_screen_page, forgetting_page, heterogeneity_page, merging_page, removal_page, variants_page
from study.cells import Results
from study.statistics import FEWEST_SEEDS, HEADROOM

FOLDER = Path(__file__).parent / "results" / "methods"
FIRST_SCREEN = "first-screen"
"""Folder, in that of the results, of the rows that every seed runs."""
LONGEST_OPEN_TABLE = 12
"""Rows of a table that is shown without a click."""
RULE = f"""The decision rule was fixed before the runs. A row **wins** in a setting only if, over at least {FEWEST_SEEDS} seeds that differ from
pre-training on, the 95 % intervals (t distribution) of its paired differences to task arithmetic *and* to the mean of five random rank
orders both lie above zero. It **loses** if that to task arithmetic lies below zero. Everything else is **not separated**. Each row's scale
is chosen on validation from one and the same grid, and the row then scored once on test; *untuned* is test at scale 1. Rows with the log
rule are judged by random ranks under the log rule, all others by those under the linear rule. p-values are adjusted by Holm for the rows of
a table, and decide nothing. A setting can tell methods apart where task arithmetic keeps {100 * HEADROOM[0]:.0f} to {100 * HEADROOM[1]:.0f}
% of the experts' own gain; elsewhere there are no verdicts. ± is half a 95 % interval over the seeds."""


def write(folder: Path = FOLDER, page: Path | None = None) -> str:
    """Write the page and its figures; the text of the page.

    Args:
        folder: Holds the results, one JSON file a seed and part, and in a folder of its own those of the rows that every seed runs; figures go there.
        page: The Markdown file; by default beside the folder, under its name.
    """
    page = folder.with_suffix(".md") if page is None else page
    first, results = _read(folder / FIRST_SCREEN), _read(folder)
    sections: dict[str, Callable[[Results, Path, str], list[str]]] = {
        "merging": merging_page.section,
        "forgetting": forgetting_page.section,
        "removal": lambda found, *_: removal_page.section(found),
        "continual": continual_page.section,
        "heterogeneity": heterogeneity_page.section,
        "variants": lambda found, *_: variants_page.section(found),
    }
    link = folder.relative_to(page.parent).as_posix() + "/"
    lines = ["# Methods compared", "", _head([*first, *results]), "", RULE]
    if first:
        lines += ["", *first_screen_page.section(first, folder / FIRST_SCREEN, f"{link}{FIRST_SCREEN}/")]
    for part, section in sections.items():
        found = [result for result in results if result["part"] == part]
        if found:
            lines += ["", *section(found, folder, link)]
    text = "\n".join(folded(lines)) + "\n"
    page.write_text(text, "utf-8")
    return text


def folded(lines: Sequence[str]) -> list[str]:
    """Return the lines of a page with every long table behind a line that opens it on a click, so that the page can be read through.

    Args:
        lines: Markdown; lines that begin with ``|`` are tables.
    """
    result: list[str] = []
    for is_table, group in groupby(lines, key=lambda line: line.startswith("|")):
        part = list(group)
        rows = len(part) - 2
        if is_table and rows > LONGEST_OPEN_TABLE:
            part = [f"<details><summary>The table of all {rows} rows</summary>", "", *part, "", "</details>"]
        result += part
    return result


def _read(folder: Path) -> list[Any]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def _head(results: Results) -> str:
    if not results:
        return "No results yet: run `python -m study seed 0`."
    seeds = sorted({result["seed"] for result in results})
    machine = next((result["machine"] for result in results if "machine" in result), None)
    said = f"Measured on {machine}. " if machine else ""
    minutes = f"{_minutes(results):.0f}"
    said += f"Made by `python -m study all` in {minutes} minutes of one core; training counts once a seed, by its longest part. "
    return f"{said}Seeds: {', '.join(map(str, seeds))}."


def _minutes(results: Results) -> float:
    """Processor time of the evaluations, and by seed of the training that took longest, as settings share models: less than all training took."""
    total = 0.0
    training: dict[int, float] = {}
    for result in results:
        taken: Any = result.get("cpu_minutes", 0.0)
        if isinstance(taken, dict):
            total += taken["evaluation"]
            training[result["seed"]] = max(training.get(result["seed"], 0.0), taken["training"])
        else:
            total += taken
    return total + sum(training.values())
