"""Scores of models as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lata_lightning.cli.common import print_json

if TYPE_CHECKING:
    from lata_lightning.evaluation.intervals import Score


class Row(NamedTuple):
    """One score of one model.

    Attributes:
        model, data, metric: The model, the data and the metric.
        value: The score; None where it is not finite.
        n: Number of rows it was measured on; None if not known.
        interval: Ends of the 95 % confidence interval; None where there is none.
    """

    model: str
    data: str
    metric: str
    value: float | None
    n: int | None = None
    interval: tuple[float, float] | None = None


def measured(model: str, data: str, metric: str, score: Score) -> Row:
    """Return the row of a score that was measured on rows of data."""
    interval = score.interval if score.interval is not None and all(map(math.isfinite, score.interval)) else None
    return Row(model, data, metric, finite(score.value), score.n, interval)


def of_tasks(model: str, scores: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Return the rows of scores of lm-evaluation-harness, with intervals from its standard errors."""
    rows = []
    for task, figures in scores.items():
        count = figures.get("n")
        for metric, value in figures.items():
            base, comma, answers = metric.partition(",")
            if metric == "n":
                continue
            error = figures.get(f"{base}_stderr{comma}{answers}", math.nan)
            interval = (value - 1.96 * error, value + 1.96 * error) if math.isfinite(error) else None
            rows.append(Row(model, task, metric, finite(value), None if count is None else int(count), interval))
    return rows


def by_metric(rows: Iterable[Row]) -> dict[str, dict[str, float | None]]:
    """Return the values of one model by data and metric."""
    found: dict[str, dict[str, float | None]] = {}
    for row in rows:
        found.setdefault(row.data, {})[row.metric] = row.value
    return found


def counts_and_intervals(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return what is known about how sure the scores of one model are, by data."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault(row.data, {"n": row.n, "intervals": {}})
        entry["intervals"][row.metric] = None if row.interval is None else list(row.interval)
    return found


def show_scores(rows: Sequence[Row], form: str) -> None:
    """Print scores: models beneath each other for each data set and metric.

    Args:
        rows: Of one model or of several.
        form: ``table`` or ``json``. In JSON a single model has its scores by data; several are keyed by model.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    if form == "json":
        found = {model: _with_intervals([row for row in rows if row.model == model]) for model in models}
        print_json(found[models[0]] if len(models) == 1 else found)
        return
    from lata_lightning.display.tables import plain_table, show

    # Standard errors are in the intervals already.
    rows = [row for row in rows if not _is_error(row.metric)]
    groups = dict.fromkeys((row.data, row.metric) for row in rows)
    if len(models) == 1:
        body = [[row.data, row.metric, *_cells(row)] for row in rows]
        show(plain_table([models[0], "measure", "score", "n", "95 % interval"], body))
        return
    body, ends = [], []
    for data, metric in groups:
        members = [row for row in rows if (row.data, row.metric) == (data, metric)]
        body += [[row.model, *((data, metric) if number == 0 else ("", "")), *_cells(row)] for number, row in enumerate(members)]
        ends.append(len(body))
    show(plain_table(["model", "data", "measure", "score", "n", "95 % interval"], body, sections=ends))


def finite(value: float | None) -> float | None:
    """Return a number, or None for one that JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _is_error(metric: str) -> bool:
    return metric.partition(",")[0].endswith("_stderr")


def _with_intervals(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    sure = counts_and_intervals(rows)
    return {data: {**values, **(sure[data] if sure[data]["n"] is not None else {})} for data, values in by_metric(rows).items()}


def _cells(row: Row) -> tuple[str, str, str]:
    value = "–" if row.value is None else f"{row.value:.4g}"
    interval = "–" if row.interval is None else f"{row.interval[0]:.4g} – {row.interval[1]:.4g}"
    return value, "–" if row.n is None else str(row.n), interval
