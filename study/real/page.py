"""The page of the comparison on a pre-trained model, made from the results of every seed: tables, verdicts and figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lata_lightning.errors import LataError, first_three
from study.cells import Results
from study.real import continual_page, encoders_page, forgetting_page, merging_page, prediction_page
from study.statistics import FEWEST_SEEDS

Section = Callable[[Results, Path, str], list[str]]


def write(folder: Path, page: Path | None = None) -> str:
    """Write the page and its figures; return the text of the page.

    Args:
        folder: Holds the results, one JSON file a seed and part; the figures go there.
        page: The Markdown file; by default beside the folder, under its name.

    Raises:
        LataError: The results are about several models.
    """
    page = folder.with_suffix(".md") if page is None else page
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    models = {result["model"] for result in results if "model" in result}
    if len(models) > 1:
        raise LataError(
            f"a page is about one model, and {folder} holds results of {first_three(models)}. Give each a folder of its own (--results)."
        )
    command = f"python -m study real {results[0]['configuration'] if results else 'smollm2_135m'}"
    lines = ["# A pre-trained model", "", _head(results, command)]
    for part, section in _SECTIONS.items():
        found = [result for result in results if result["part"] == part]
        if found:
            seeds = " ".join(str(seed) for seed in sorted({result["seed"] for result in found}))
            made = [f"Made by `{command} --part {part} --seeds {seeds}` in {sum(result['minutes'] for result in found):.0f} minutes."]
            title, *rest = section(found, folder, folder.relative_to(page.parent).as_posix() + "/")
            lines += ["", title, "", *made, *rest]
    text = "\n".join(lines) + "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, "utf-8")
    return text


def _head(results: Results, command: str) -> str:
    if not results:
        return f"No results yet: run `{command}`."
    seeds = sorted({result["seed"] for result in results})
    models = sorted({result[key] for result in results for key in ("model", "encoder") if key in result})
    return (
        f"Models: {', '.join(f'`{model}`' for model in models)}. Measured on {results[0]['machine']}. Seeds: {', '.join(map(str, seeds))}. A seed "
        "is one of "
        "fine-tuning: the draw and the order of rows, the random numbers of adapters and heads. The pre-trained weights are the same for all, so "
        "intervals "
        f"say nothing about other models. The decision rule is that of the small models and gives no verdict below {FEWEST_SEEDS} seeds. ± is half a 95 % "
        f"interval over the seeds. This page is written by `{command} --page`."
    )


_SECTIONS: dict[str, Section] = {
    "merging": merging_page.section,
    "prediction": prediction_page.section,
    "forgetting": forgetting_page.section,
    "continual": continual_page.section,
    "encoders": encoders_page.section,
}
