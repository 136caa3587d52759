"""Figures of the evidence: scale curves, forgetting curves, accuracies of continual learning by task, and the spread of alignments against the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.statistics import interval

COLOURS = ("#1f6fb4", "#c2410c", "#0f766e", "#9333a8", "#8a6d00", "#be185d", "#4d7c0f", "#475569")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
# Markers and colours say the same, so that a curve is found without colour.

Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""By line, then by place on the horizontal axis, the values of the seeds."""


def scale_curves(curves: Curves, title: str, path: Path, y_title: str = "validation score, %") -> Path:
    """Mean over the seeds by scale, with the 95 % interval as a band."""
    figure, axes = _empty(title, "scale", y_title)
    for number, (name, points) in enumerate(curves.items()):
        _band(axes, number, name, points)
    # Small scales are where methods differ; a logarithm has no place for 0.
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    places = sorted({place for points in curves.values() for place in points})
    axes.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
    axes.minorticks_off()
    # Far beyond the best scale a merge breaks down, which would flatten everything else.
    means = {name: [interval(points[place]).mean for place in sorted(points)] for name, points in curves.items()}
    least, most = min(values[0] for values in means.values()), max(max(values) for values in means.values())
    axes.set_ylim(least - 0.6 * (most - least) - 0.5, most + 0.12 * (most - least) + 0.5)
    return _saved(figure, path)


def forgetting_curves(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path) -> Path:
    """What is kept against what is left of the unwanted skill, from right to left as the scale grows; one line a method."""
    figure, axes = _empty(title, "left of the unwanted skill, % of the target's own", "kept of useful and instruct skills, %")
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), label=name, **_style(number))
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def stage_curves(curves: Curves, title: str, path: Path) -> Path:
    """Mean over the seeds by number of tasks learned, with the 95 % interval as a band."""
    figure, axes = _empty(title, "tasks learned", "accuracy on them, %")
    for number, (name, points) in enumerate(curves.items()):
        _band(axes, number, name, {place: [100 * value for value in values] for place, values in points.items()})
    places = sorted({place for points in curves.values() for place in points})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    return _saved(figure, path)


def spread_against_gain(points: Mapping[str, Sequence[tuple[float, float]]], title: str, y_title: str, path: Path) -> Path:
    """One point a seed: how far the alignments are spread, and what LATA gains."""
    figure, axes = _empty(title, "spread of the alignments (largest − smallest block)", y_title, height=5.0)
    for number, (name, pairs) in enumerate(points.items()):
        spreads, gains = zip(*pairs, strict=True)
        style = _style(number)
        axes.scatter(spreads, gains, s=22, label=name, color=style["color"], marker=style["marker"])
    axes.axhline(0, color="black", linewidth=0.8)
    # Names are long and may be many: inside the axes they would cover the points.
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return _saved(figure, path)


def alignment_maps(maps: Mapping[str, Sequence[Sequence[float | None]]], steps: Sequence[int], title: str, path: Path) -> Path:
    """Heat maps side by side on one colour scale: alignment by block, from top to bottom, and by measurement.

    Args:
        maps: By title, the rows of values; all of the same shape.
        steps: Optimizer steps of the measurements.
        title: Of the figure.
        path: File to write.
    """
    known = [value for rows in maps.values() for row in rows for value in row if value is not None]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for panel, (name, rows) in zip(panels, maps.items(), strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in rows]
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=min(known), vmax=max(known), interpolation="nearest")
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(steps)), [str(step) for step in steps], fontsize=7)
        panel.set_xlabel("optimizer steps")
    panels[0].set_ylabel("block")
    figure.colorbar(image, ax=panels, label="alignment")
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return _saved(figure, path)


def correlation_intervals(rows: Mapping[str, tuple[float, float, float]], title: str, path: Path) -> Path:
    """A line for each row, from the lower to the upper end of its interval with a point at its value; the first one at the top."""
    figure, axes = _empty(title, "rank correlation", "", height=1.2 + 0.3 * len(rows))
    for number, (value, low, high) in enumerate(rows.values()):
        axes.errorbar(value, -number, xerr=[[value - low], [high - value]], fmt="o", color=COLOURS[0], capsize=3, markersize=4)
    axes.set_yticks([-number for number in range(len(rows))], list(rows), fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    return _saved(figure, path)


def _band(axes: Axes, number: int, name: str, points: Mapping[float, Sequence[float]]) -> None:
    places = sorted(points)
    found = [interval(points[place]) for place in places]
    style = _style(number)
    axes.plot(places, [each.mean for each in found], label=name, **style)
    if all(each.half_width is not None for each in found):
        axes.fill_between(
            places, [each.low for each in found], [each.high for each in found], color=style["color"], alpha=0.12, linewidth=0
        )
    axes.legend(frameon=False, fontsize=8)


def _style(number: int) -> dict[str, Any]:
    # Where colours begin again, markers are one further.
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4.0, "linewidth": 1.5}


def _empty(title: str, x_title: str, y_title: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same bytes, and text stays text, which is small.
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path
