"""The section about forgetting facts: what is left and what is kept where as much is forgotten as by a retrained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import table
from study.cells import DASH, Results, as_text, compared, decisive, of_values, strong

_HEADS = [
    "row",
    "kind",
    "scale",
    "forgotten, %",
    "kept, %",
    "forget quality, log10",
    "ROUGE-L forgotten",
    "utility",
    "instructions, nats",
    "text, nats",
]


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Return the lines of the section; it has no figure."""
    shown, said = decisive(results)
    lines = [
        "## Forgetting",
        "",
        "Every way of taking the facts off the target is stopped at the smallest scale at which the facts are no more probable than for the "
        "retrained model. "
        "*Forgotten* and *kept* are the mean probability of the answers. Forget quality is log10 p of the test that truth ratios are those of the "
        "retrained "
        "model (0: they cannot be told apart); its wrong answers are those to the question of the same number about other authors. Utility is that of the "
        f"facts to be kept.{said}",
    ]
    references = {name: [result["references"][name] for result in shown] for name in shown[0]["references"]}
    lines += ["", *table(_HEADS, [[name, "reference", DASH, *_measures(found)] for name, found in references.items()])]
    for case in shown[0]["cases"]:
        methods = shown[0]["cases"][case]["methods"]
        kept = {
            name: {
                result["seed"]: 100 * measured["kept"]
                for result in shown
                if (measured := result["cases"][case]["methods"][name]["measured"]) is not None
            }
            for name in methods
        }
        judged = compared({name: scores for name, scores in kept.items() if len(scores) == len(shown)}, "negation")
        rows = []
        for name in methods:
            found = [result["cases"][case]["methods"][name] for result in shown]
            reached = [each for each in found if each["measured"] is not None]
            row = judged.get(name)
            scale = f"{median(each['scale'] for each in reached):.3g}" if reached else "not reached"
            rows.append(
                [
                    strong(name, row),
                    methods[name]["kind"],
                    scale + (f" ({len(reached)} of {len(found)})" if reached and len(reached) < len(found) else ""),
                    *_measures([each["measured"] for each in reached]),
                    as_text(row.against_task_arithmetic if row else None, signed=True),
                ]
            )
        spread = of_values([result["cases"][case]["spread"] for result in shown], ".4f")
        lines += ["", f"### Forgetting, {case}", "", f"Spread of the alignments {spread}. The last column is in points of *kept*, %.", ""]
        lines += table([*_HEADS, "− negation"], rows)
    return lines


def _measures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(key: str, form: str, times: float = 1.0) -> str:
        values = [times * each[key] for each in found if each[key] is not None]
        return of_values(values or None, form)

    return [
        mean("probability", ".1f", 100),
        mean("kept", ".1f", 100),
        mean("forget_quality_log10", ".1f"),
        mean("forget_Q_A_ROUGE", ".2f"),
        mean("model_utility", ".2f"),
        mean("instruct", ".3f"),
        mean("text", ".3f"),
    ]
