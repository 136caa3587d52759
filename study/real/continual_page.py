"""The section about continual learning: what is kept of every expert's gain after each data set."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from benchmarks.bench import table
from study import figures
from study.cells import (
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
    strong,
)
from study.real.continual import MAGMAX, REPLAY, SEQUENTIAL
from study.real.merging_page import DRAWN


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Return the lines of the section; its figure is written to the folder."""
    shown, said = decisive(results)
    first = shown[0]
    names = first["methods"]
    stages = range(1, len(first["tasks"]) + 1)
    rows = {name: [name] for name in names if not is_random(name)} | random_groups(names)

    def kept(result: Result, name: str, stage: int) -> float:
        return 100 * fmean(result["methods"][name]["matrix"][stage - 1][:stage])

    judged = compared({name: {result["seed"]: kept(result, name, len(stages)) for result in shown} for name in names}, TASK_ARITHMETIC)
    lines = [
        [
            strong(label, judged.get(label)),
            names[group[0]]["kind"],
            *(of_values([fmean(kept(result, name, stage) for name in group) for result in shown]) for stage in stages),
            *(
                of_values([100 * fmean(result["methods"][name][measure] or 0.0 for name in group) for result in shown])
                for measure in ("backward_transfer", "forgetting")
            ),
            of_values([fmean(result["methods"][name]["instruct"][-1] for name in group) for result in shown], ".3f"),
            as_text(judged[label].against_task_arithmetic, signed=True),
        ]
        for label, group in rows.items()
    ]
    curves = {
        label: {stage: [fmean(kept(result, name, stage) for name in group) / 100 for result in shown] for stage in stages}
        for label, group in drawn_rows((SEQUENTIAL, REPLAY, MAGMAX, *DRAWN), names).items()
    }
    path = figures.stage_curves(curves, "Continual learning on a pre-trained model", folder / "continual.svg")
    heads = [
        "row",
        "kind",
        *(f"{stage} learned" for stage in stages),
        "backward transfer",
        "forgetting",
        "instructions, nats",
        "− task arithmetic",
    ]
    return [
        "## Continual learning",
        "",
        f"Data sets in order: {', '.join(first['tasks'])}, from the instruct tune. Cells are the share of each expert's own gain in held-out "
        "loss, averaged over "
        f"what was learned so far, in %; an expert alone has 100. The last column is after the last data set.{said}",
        "",
        *table(heads, lines),
        "",
        f"![Gain kept on what was learned so far]({link}{path.name})",
    ]
