"""The section about variants of the merges by regression: on development seeds, at scale 1, by validation score."""

from __future__ import annotations

from statistics import fmean

from benchmarks.bench import table
from study.cells import Results
from study.variants import LEAST_GAIN


def section(results: Results) -> list[str]:
    """Lines of the page."""
    settings = results[0]["settings"]
    names = next(iter(settings.values()))
    means = {
        name: [fmean(100 * result["settings"][setting][name]["validation"] for result in results) for setting in settings] for name in names
    }
    rows = [[name, f"{fmean(means[name]):.1f}", *(f"{value:.1f}" for value in means[name])] for name in names]
    seeds = " and ".join(str(result["seed"]) for result in results)
    return [
        "## Variants, on development seeds",
        "",
        f"Validation score at scale 1 on the seeds {seeds}, which decide nothing else. The rule was written down first: of each kind, without samples and "
        f"with them, the variant with the highest mean is chosen, and the package's own stays unless another is better by {LEAST_GAIN:g} points.",
        "",
        *table(["variant", "mean", *settings], sorted(rows, key=lambda row: -float(row[1]))),
    ]
