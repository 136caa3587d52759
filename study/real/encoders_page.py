"""The section about encoders with heads of their own: addition, disentanglement and negation, by way of fine-tuning."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

from benchmarks.bench import table
from study.cells import DASH, Result, Results, as_text, decisive, of_values
from study.statistics import interval


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Return the lines of the section; it has no figure."""
    shown, said = decisive(results)
    first = shown[0]
    names = list(first["tasks"])
    lines = [
        "## Encoders with heads of their own",
        "",
        f"Fine-tuned on {' and '.join(f'{name} ({count} classes)' for name, count in first['tasks'].items())}, each with a head of its own that "
        "is not merged. "
        f"Accuracy on test in %; normalised accuracy is relative to the fine-tune on one data set.{said}",
        "",
    ]
    rows = []
    for training in first["trainings"]:
        each = [result["trainings"][training] for result in shown]
        rows.append(
            [
                f"{training}: start, with the heads",
                *(of_values([100 * found["start"][name] for found in each]) for name in names),
                DASH,
                DASH,
            ]
        )
        rows.append(
            [
                f"{training}: one data set",
                *(of_values([100 * found["single"]["test"][name] for found in each]) for name in names),
                "100.0",
                DASH,
            ]
        )
        for row in each[0]["rows"]:
            merged = [found["rows"][row] for found in each]
            rows.append(
                [
                    f"{training}: {row}",
                    *(of_values([100 * found["test"][name] for found in merged]) for name in names),
                    of_values([100 * found["normalised"] for found in merged]),
                    f"{median(found['scale'] for found in merged):g}",
                ]
            )
    lines += table(["row", *names, "normalised, %", "scale"], rows)
    lines += [
        "",
        "Weight disentanglement error ξ, mean over scales in [0, 1]² (0: each vector acts on its own data only), and negation: one vector is "
        "taken off the "
        "encoder that has both, as far as the other data set keeps 95 % of its accuracy.",
        "",
    ]
    heads = ["training", "ξ of predictions", "ξ of features", *(f"{name} forgotten: target / control, %" for name in names)]
    cells = []
    for training in first["trainings"]:
        each = [result["trainings"][training] for result in shown]
        errors = (
            of_values([found["disentanglement"][kind]["mean in [0, 1]²"] for found in each], ".4f")
            for kind in ("prediction", "representation")
        )
        negated = (
            " / ".join(f"{100 * fmean(found['negation'][name][side] for found in each):.1f}" for side in ("target", "control"))
            for name in names
        )
        cells.append([training, *errors, *negated])
    lines += table(heads, cells)
    if {"full", "attention only"} <= set(first["trainings"]):
        gained = [_xi(result, "full") - _xi(result, "attention only") for result in shown]
        lines += [
            "",
            f"ξ of predictions, full − attention only, paired over the seeds: {as_text(interval(gained), signed=True, form='.4f')}.",
        ]
    return lines


def _xi(result: Result, training: str) -> float:
    value: float = result["trainings"][training]["disentanglement"]["prediction"]["mean in [0, 1]²"]
    return value
