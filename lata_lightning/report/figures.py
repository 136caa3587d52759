"""The charts of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.display.charts import (
    Chart,
    HeatMap,
    Lines,
    Series,
    alignment_over_training,
    as_text,
    axis_title,
    clip,
    extremes,
    short_names,
)
from lata_lightning.layers import LayerMap
from lata_lightning.moments import Moments, total
from lata_lightning.report.measuring import PairwiseMoments
from lata_lightning.report.reading import HistoryEntry
from lata_lightning.vectors.provenance import OUTSIDE, Derivation

Histories = Sequence[tuple[int, str, Sequence[HistoryEntry]]]
"""Number, label and history of each run; the number decides its colour."""


def alignment_heat_maps(histories: Histories) -> list[HeatMap]:
    """Return a heat map for each run with a known alignment, all with one colour scale."""
    measured = {number: [(row.step, row.epoch, row.layers) for row in rows] for number, _, rows in histories}
    moved = [stats for rows in measured.values() for _, _, alignment in rows for stats in alignment.layers.values() if stats.moved]
    known = [stats.alignment for stats in moved if stats.alignment is not None]
    bounds = (min(known), max(known)) if known else None
    charts = [
        alignment_over_training(measured[number], f"alignment-{number + 1}", f"Alignment over training: {label}", bounds)
        for number, label, _ in histories
    ]
    return [chart for chart in charts if chart is not None]


def growth(histories: Histories) -> list[Lines]:
    """Return charts of norm, relative norm, alignment and cosines with other vectors, of the whole model over the steps.

    Those that no run has are left out.
    """
    others = sorted({other for _, _, rows in histories for row in rows for other in row.cosines})
    return [
        chart
        for chart in (
            _over_steps(histories, "growth-norm", "Norm of the task vector", "‖task vector‖", ".4g", lambda row: row.task_norm),
            _over_steps(histories, "growth-relative", "Relative norm", "‖task‖ / ‖instruction‖", ".4f", lambda row: row.relative_norm),
            _over_steps(histories, "growth-alignment", "Alignment of the whole model", "alignment", ".4f", lambda row: row.alignment),
            *(
                _over_steps(histories, f"cosine-{other}", f"Cosine with {other}", "cosine", ".4f", partial(_cosine_with, other))
                for other in others
            ),
        )
        if chart is not None
    ]


def _cosine_with(other: str, row: HistoryEntry) -> float | None:
    return row.cosines.get(other)


def by_layer(alignments: Sequence[tuple[int, str, Alignment]]) -> list[Lines]:
    """Return charts of coefficient, alignment, relative norm and norm by layer; vectors that have the same layers share a chart.

    Args:
        alignments: Number, label and last measurement of each vector.
    """
    groups: dict[tuple[str, ...], list[tuple[int, str, Alignment]]] = {}
    for entry in alignments:
        if entry[2].layers:
            groups.setdefault(tuple(entry[2].layers), []).append(entry)
    charts = []
    for group, (layers, members) in enumerate(groups.items(), start=1):
        where = "" if len(groups) == 1 else ": " + ", ".join(label for _, label, _ in members)
        ending = "" if len(groups) == 1 else f"-{group}"
        for key, title, y_title, form, of, ranked in _LAYER_FIGURES:
            chart = _over_layers(layers, members, f"{key}{ending}", f"{title} by layer{where}", y_title, form, of, ranked)
            if chart is not None:
                charts.append(chart)
    return charts


def by_part(vectors: Sequence[tuple[int, str, Mapping[str, Moments]]], layers: LayerMap) -> list[HeatMap]:
    """Return heat maps of norm, relative norm and alignment by part of the block; the last two only where the instruction vector is known.

    Args:
        vectors: Number, label and moments by tensor of each vector; the charts of one measure share a colour scale.
        layers: The layer of every tensor.
    """
    tensors = layers.layers("submodule")
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in tensors))
    ticks, prefix = short_names(layers.blocks)
    charts = []
    for key, title, form, of in _PART_FIGURES:
        by_vector = {
            number: {part: of(total(table[name] for name in names)) for part, names in tensors.items()} for number, _, table in vectors
        }
        every = [value for values in by_vector.values() for value in values.values() if value is not None]
        for number, label, _ in vectors:
            known = {name: value for name, value in by_vector[number].items() if value is not None}
            if known:
                charts.append(
                    HeatMap(
                        key=f"{key}-{number + 1}",
                        title=f"{title} by part: {label}",
                        summary=f"{len(parts)} parts of {len(layers.blocks)} blocks: {extremes(known, form)}.",
                        rows=tuple(parts),
                        columns=layers.blocks,
                        values=tuple(tuple(known.get(f"{block}.{part}") for block in layers.blocks) for part in parts),
                        row_title="part",
                        column_title=axis_title("block", prefix),
                        value_title=title.lower(),
                        row_ticks=tuple(parts),
                        column_ticks=ticks,
                        form=form,
                        bounds=(min(every), max(every)),
                    )
                )
    return charts


def interference(derivations: Sequence[tuple[int, str, Derivation]]) -> list[HeatMap]:
    """Return a heat map, by layer, of the interference between the vectors from which another vector was derived; one for each derived vector.

    Args:
        derivations: Number, label and derivation of each derived vector.
    """
    charts = []
    for number, label, made in derivations:
        measured = [entry for entry in made.measured if entry.vector is not None]
        values = {f"{entry.vector}, {layer}": value for entry in measured for layer, value in entry.layers.items() if value is not None}
        if not values:
            continue
        layers = tuple(dict.fromkeys(layer for entry in measured for layer in entry.layers))
        inside = [layer for layer in layers if layer != OUTSIDE]
        ticks, prefix = short_names(inside)
        rows = tuple(str(entry.vector) for entry in measured)
        charts.append(
            HeatMap(
                key=f"interference-{number + 1}",
                title=f"Interference: {label}",
                summary=f"{len(rows)} vectors in {len(layers)} layers: {extremes(values, '.3f')}.",
                rows=rows,
                columns=layers,
                values=tuple(tuple(entry.layers.get(layer) for layer in layers) for entry in measured),
                row_title="vector",
                column_title=axis_title("layer", prefix),
                value_title=measured[0].name,
                row_ticks=tuple(clip(row) for row in rows),
                column_ticks=(*ticks, *(["outside"] if OUTSIDE in layers else [])),
                form=".3f",
            )
        )
    return charts


def pairwise(labels: Sequence[str], measured: PairwiseMoments, layers: LayerMap) -> list[Chart]:
    """Return heat maps of the cosine of every two vectors: over all tensors, and by block."""
    count = len(labels)
    whole = [[measured.cosine(one, other, measured.tables[one]) for other in range(count)] for one in range(count)]
    known = {f"{labels[one]} and {labels[other]}": value for one, other in measured.pairs if (value := whole[one][other]) is not None}
    charts: list[Chart] = [
        HeatMap(
            key="pairs-whole",
            title="Cosine of every two vectors",
            summary=f"{count} vectors over all tensors: {extremes(known, '.4f')}."
            if known
            else "A vector is zero, so no cosine is defined.",
            rows=tuple(labels),
            columns=tuple(labels),
            values=tuple(tuple(row) for row in whole),
            row_title="vector",
            column_title="vector",
            value_title="cosine",
            row_ticks=tuple(map(clip, labels)),
            column_ticks=tuple(map(clip, labels)),
            bounds=(-1.0, 1.0),
            diverging=True,
        )
    ]
    blocks = layers.layers("block")
    if not blocks:
        return charts
    ticks, prefix = short_names(list(blocks))
    rows = {f"{labels[one]} · {labels[other]}": (one, other) for one, other in measured.pairs}
    values = tuple(tuple(measured.cosine(one, other, names) for names in blocks.values()) for one, other in rows.values())
    at = {
        f"{pair}, {block}": value
        for pair, row in zip(rows, values, strict=True)
        for block, value in zip(blocks, row, strict=True)
        if value is not None
    }
    charts.append(
        HeatMap(
            key="pairs-by-block",
            title="Cosine of every two vectors by block",
            summary=f"{len(blocks)} blocks: {extremes(at, '.4f')}." if at else "No cosine is defined.",
            rows=tuple(rows),
            columns=tuple(blocks),
            values=values,
            row_title="vectors",
            column_title=axis_title("block", prefix),
            value_title="cosine",
            row_ticks=tuple(map(clip, rows)),
            column_ticks=ticks,
            diverging=True,
        )
    )
    return charts


def _over_steps(
    histories: Histories, key: str, title: str, y_title: str, form: str, of: Callable[[HistoryEntry], float | None]
) -> Lines | None:
    series = []
    for number, label, rows in histories:
        points: dict[float | str, float | None] = {row.step: of(row) for row in rows if of(row) is not None}
        if points:
            series.append(Series(label, number, points))
    if not series:
        return None
    words = [f"{line.name}: {_course(list(line.points.items()), form)}" for line in series]
    return Lines(key, title, "; ".join(words) + ".", "optimizer steps", y_title, tuple(series), form=form)


def _course(points: Sequence[tuple[float | str, float | None]], form: str) -> str:
    (first, before), (last, after) = points[0], points[-1]
    if len(points) == 1:
        return f"{as_text(before, form)} at step {first}"
    return f"{as_text(before, form)} at step {first}, {as_text(after, form)} at step {last}"


def _over_layers(
    layers: Sequence[str],
    members: Sequence[tuple[int, str, Alignment]],
    key: str,
    title: str,
    y_title: str,
    form: str,
    of: Callable[[LayerStats], float | None],
    ranked: bool,
) -> Lines | None:
    by_label: dict[str, dict[float | str, float | None]] = {
        label: {layer: of(alignment.layers[layer]) for layer in layers} for _, label, alignment in members
    }
    series = [
        Series(label, number, by_label[label], muted=ranked and alignment.flat)
        for number, label, alignment in members
        if any(value is not None for value in by_label[label].values())
    ]
    if not series:
        return None
    ticks, prefix = short_names(layers)
    words = [
        f"{line.name}: {extremes({str(layer): value for layer, value in line.points.items() if value is not None}, form)}"
        + (" (too flat to rank, in grey)" if line.muted else "")
        for line in series
    ]
    return Lines(
        key,
        title,
        "; ".join(words) + ".",
        axis_title(members[0][2].level, prefix),
        y_title,
        tuple(series),
        dict(zip(layers, ticks, strict=True)),
        form,
    )


# Key, title, title of the axis, format, value, and whether layers are ranked by it.
_LAYER_FIGURES: tuple[tuple[str, str, str, str, Callable[[LayerStats], float | None], bool], ...] = (
    ("coefficients", "Coefficient", "coefficient", ".4f", lambda stats: stats.coefficient, True),
    ("alignments", "Alignment", "alignment", ".4f", lambda stats: stats.alignment if stats.moved else None, True),
    ("relative-norms", "Relative norm", "‖task‖ / ‖instruction‖", ".4f", lambda stats: stats.relative_norm if stats.moved else None, False),
    ("norms", "Norm", "‖task vector‖", ".4g", lambda stats: stats.task_norm or None, False),
)
_PART_FIGURES: tuple[tuple[str, str, str, Callable[[Moments], float | None]], ...] = (
    ("part-norms", "Norm", ".4g", lambda sums: sums.task_norm or None),
    ("part-relative-norms", "Relative norm", ".4f", lambda sums: sums.relative_norm if sums.task else None),
    ("part-alignments", "Alignment", ".4f", lambda sums: sums.alignment if sums.task else None),
)
