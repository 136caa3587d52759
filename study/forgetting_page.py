"""The section about forgetting: for each ancestry of the vectors what is kept at equal residuals of the unwanted skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.bench import table
from study import figures
from study.cells import (
    DASH,
    Result,
    Results,
    as_text,
    compared,
    decisive,
    drawn_rows,
    is_random,
    key_of,
    of_values,
    random_groups,
    strong,
)

NEGATION = "negation"
JUDGED = "0.1"
"""The residual at which ways of forgetting are judged."""
_KINDS = ("method", "baseline", "candidate", "control")
_DRAWN = (
    NEGATION,
    "LATA linear",
    "LATA log",
    "reversed ranks",
    "exact subtraction",
    "across the instruction vector, by tensor",
    "fine-tuning on retained data",
)


def section(results: Results, folder: Path, link: str) -> list[str]:
    """Lines of the page; the figures are written to the folder."""
    shown, said = decisive(results)
    first = shown[0]
    lines = [
        "## Forgetting",
        "",
        f"The unwanted skill is {first['unwanted']}, the useful one {first['useful']}. Ways of forgetting are compared where validation says that equal "
        "shares of the target's own score on the unwanted skill are left. Cells give the useful / the instruct skills on test there, in % of the target's "
        f"own. Differences and verdicts are of the mean of both at {float(JUDGED):.0%} left, with plain negation in the place of task arithmetic. What "
        "lies across the instruction vector is what `lata project` makes; exact subtraction is what `--start base --weighting none` does with a vector "
        "from base: it takes the instruction vector off first. A known ancestry is target and vector from instruct, an unknown one both from base, a "
        f"mixed one a vector from base and a target from instruct.{said}",
    ]
    for case in first["cases"]:
        rows = {result["seed"]: result["cases"][case] for result in shown}
        path = figures.forgetting_curves(_curves(rows), f"Forgetting, {case} ancestry", folder / f"forgetting-{key_of(case)}.svg")
        lines += [
            "",
            f"### {case[0].upper()}{case[1:]} ancestry",
            "",
            *_table(rows, first["residuals"]),
            "",
            f"![What is kept by what is left of the unwanted skill, {case} ancestry]({link}{path.name})",
        ]
    return lines


def _table(rows: Mapping[int, Result], residuals: Sequence[float]) -> list[str]:
    methods = {name: row for case in rows.values() for name, row in case["methods"].items()}
    levels = [f"{residual:g}" for residual in residuals]
    ran = {name: {seed: case for seed, case in rows.items() if name in case["methods"]} for name in methods}
    reached = {
        name: {seed: sum(kept) / 2 for seed, case in ran[name].items() if (kept := _kept(case, name, JUDGED)) is not None}
        for name in methods
    }
    # What is reached in some seeds only is not compared.
    judged = compared({name: scores for name, scores in reached.items() if len(scores) == len(ran[name])}, NEGATION)
    ordered = sorted(methods, key=lambda each: _KINDS.index(methods[each]["kind"]))
    shown = {name: [name] for name in ordered if not is_random(name)} | random_groups(methods)
    lines = []
    for label, names in shown.items():
        row = judged.get(label)
        lines.append(
            [
                strong(label, row),
                methods[names[0]]["kind"],
                str(len(ran[names[0]])),
                *(_both([_kept(case, name, level) for name in names for case in ran[name].values()]) for level in levels),
                _perplexity([case["methods"][name]["at"][JUDGED] for name in names for case in ran[name].values()]),
                as_text(row.against_task_arithmetic if row else None, signed=True),
                as_text(row.against_random if row else None, signed=True),
                (row.verdict if row else None) or DASH,
            ]
        )
    heads = [
        "row",
        "kind",
        "seeds",
        *(f"{residual:.0%} left" for residual in residuals),
        f"perplexity at {float(JUDGED):.0%}",
        "− negation",
        "− random",
        "verdict",
    ]
    targets = [case["target"]["test"] for case in rows.values()]
    own = ", ".join(f"{key} {of_values([100 * target[key] for target in targets])}" for key in ("unwanted", "useful", "instruct"))
    perplexity = of_values([target["perplexity"] for target in targets], ".3f")
    spreads = of_values([case["spread"] for case in rows.values()], ".3f")
    return [
        f"{len(rows)} seeds. The target's own scores on test, %: {own}; perplexity of base text {perplexity}. Spread of the alignments {spreads}.",
        "",
        *table(heads, lines),
    ]


def _kept(case: Result, method: str, level: str) -> tuple[float, float] | None:
    """Useful and instruct skills on test, in % of the target's own, at a residual; None where it is not reached."""
    reached = case["methods"][method]["at"][level]
    if reached is None:
        return None
    useful, instruct = (100 * reached["test"][key] / case["target"]["test"][key] for key in ("useful", "instruct"))
    return useful, instruct


def _both(values: Sequence[tuple[float, float] | None]) -> str:
    """Means of both, and how often the residual was reached if not always."""
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    means = " / ".join(f"{sum(each) / len(known):.0f}" for each in zip(*known, strict=True))
    return means if len(known) == len(values) else f"{means} ({len(known)} of {len(values)})"


def _perplexity(reached: Sequence[Result | None]) -> str:
    known = [each["test"]["perplexity"] for each in reached if each is not None]
    return f"{sum(known) / len(known):.3g}" if known else DASH


def _curves(rows: Mapping[int, Result]) -> dict[str, list[tuple[float, float]]]:
    """By scale, as far as all seeds go, means of what is left and of what is kept."""
    found = {}
    methods = {name: row for case in rows.values() for name, row in case["methods"].items()}
    for label, names in drawn_rows(_DRAWN, methods).items():
        curves = [
            (case["methods"][name]["curve"], case["target"]["validation"])
            for case in rows.values()
            for name in names
            if name in case["methods"]
        ]
        found[label] = [_mean_point(points, [own for _, own in curves]) for points in zip(*(curve for curve, _ in curves), strict=False)]
    return found


def _mean_point(points: Sequence[Result], targets: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    pairs = list(zip(points, targets, strict=True))
    left = sum(100 * point["unwanted"] / own["unwanted"] for point, own in pairs)
    kept = sum(50 * (point["useful"] / own["useful"] + point["instruct"] / own["instruct"]) for point, own in pairs)
    return left / len(pairs), kept / len(pairs)
