"""The charts of what models scored: model by data set, and score by scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lata_lightning.display.charts import HeatMap, Lines, Series, clip, extremes
from lata_lightning.report.reading import ScaleCurves


def scores_by_model(models: Sequence[tuple[str, Mapping[str, Mapping[str, float | None]]]]) -> list[HeatMap]:
    """Return a heat map of each measure, model by data set; none for a single model, which a table shows as well.

    Args:
        models: Label of each model, and its scores by data set and measure.
    """
    if len(models) < 2:
        return []
    charts: list[HeatMap] = []
    for measure in dict.fromkeys(measure for _, scores in models for row in scores.values() for measure in row):
        data = tuple(dict.fromkeys(name for _, scores in models for name, row in scores.items() if measure in row))
        values = tuple(tuple(scores.get(name, {}).get(measure) for name in data) for _, scores in models)
        known = {
            f"{label} on {name}": value
            for (label, _), row in zip(models, values, strict=True)
            for name, value in zip(data, row, strict=True)
            if value is not None
        }
        words = measure.replace("_", " ")
        charts.append(
            HeatMap(
                key=f"scores-{len(charts) + 1}",
                title=f"Scores of every model: {words}",
                summary=f"{len(models)} models: {extremes(known, '.4g')}." if known else "No score is known.",
                rows=tuple(label for label, _ in models),
                columns=data,
                values=values,
                row_title="model",
                column_title="data",
                value_title=words,
                row_ticks=tuple(clip(label) for label, _ in models),
                column_ticks=tuple(map(clip, data)),
                form=".4g",
            )
        )
    return charts


def scale_curve(number: int, label: str, scales: ScaleCurves) -> Lines:
    """Every score over the scale."""
    tried = sorted({scale for curve in scales.curves.values() for scale in curve})
    words = [f"{len(tried)} scales from {tried[0]:g} to {tried[-1]:g}."]
    if scales.chosen:
        words.append(f"Chosen: {scales.chosen}.")
    words += [
        f"{name}: {extremes({f'at {scale:g}': score for scale, score in curve.items()}, '.4g')}." for name, curve in scales.curves.items()
    ]
    return Lines(
        key=f"scales-{number + 1}",
        title=f"Scores over the scale: {label}",
        summary=" ".join(words),
        x_title="scale",
        y_title=scales.metric,
        series=tuple(Series(name, colour, dict(curve.items())) for colour, (name, curve) in enumerate(scales.curves.items())),
    )
