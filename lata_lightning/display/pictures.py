"""Charts drawn by matplotlib, for files and loggers. Needs the extra ``report``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

from lata_lightning.display.charts import Chart, HeatMap, Lines, ink_on
from lata_lightning.errors import OutputError

COLOURS = ("#1f6fb4", "#c2410c", "#0f766e", "#9333a8", "#8a6d00", "#be185d", "#4d7c0f", "#475569")
MUTED = "#6b7480"
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_MOST_TICKS = 40
_MOST_NUMBERS = 12


def draw(chart: Chart) -> Figure:
    """Draw a chart as a figure without a window."""
    figure = Figure(figsize=_size(chart), layout="constrained")
    draw_on(chart, figure.add_subplot())
    return figure


def draw_on(chart: Chart, axes: Axes) -> None:
    """Draw a chart into existing axes."""
    if isinstance(chart, HeatMap):
        _draw_heat_map(chart, axes)
    else:
        _draw_lines(chart, axes)


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as an image, uint8 of shape (height, width, 4)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib has no annotation here
    return np.array(canvas.buffer_rgba())  # type: ignore[no-untyped-call]


def save(chart: Chart, directory: str | Path) -> list[Path]:
    """Write a chart as PNG and SVG files named after its key, and return the two paths. The same chart gives the same bytes.

    Raises:
        OutputError: The directory cannot be written to.
    """
    figure, target = draw(chart), Path(directory)
    paths = [target / f"{chart.key}.{ending}" for ending in ("png", "svg")]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": chart.key}):
            for path in paths:
                figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise OutputError(f"the figures cannot be written to {target}: {error.strerror}") from error
    return paths


def _size(chart: Chart) -> tuple[float, float]:
    """Width and height of a figure in inches."""
    if isinstance(chart, HeatMap):
        return min(max(6.4, 0.32 * len(chart.columns) + 2.6), 16.0), min(0.26 * len(chart.rows), 24.0) + 1.8
    return 6.8, 4.0


def _draw_heat_map(chart: HeatMap, axes: Axes) -> None:
    low, high = chart.limits
    values = np.array([[np.nan if value is None else value for value in row] for row in chart.values])
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="binary" if chart.muted else "PuOr" if chart.diverging else "viridis",
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    _names(axes, "y", chart.row_ticks)
    _names(axes, "x", chart.column_ticks)
    if len(chart.columns) <= _MOST_NUMBERS and len(chart.rows) <= _MOST_TICKS:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = ink_on(*image.cmap(image.norm(value))[:3])
                axes.text(column, row, format(value, chart.form), ha="center", va="center", fontsize=7, color=ink)
    _label(axes, chart.title, chart.column_title, chart.row_title)
    axes.figure.colorbar(image, ax=axes, label=_plain(chart.value_title))


def _draw_lines(chart: Lines, axes: Axes) -> None:
    positions = {name: index for index, name in enumerate(chart.ticks)}
    for line in chart.series:
        points = [(positions[at] if isinstance(at, str) else at, np.nan if value is None else value) for at, value in line.points.items()]
        style = line.colour % len(COLOURS)
        axes.plot(
            [at for at, _ in points],
            [value for _, value in points],
            color=MUTED if line.muted else COLOURS[style],
            marker=MARKERS[style],
            markersize=4,
            linewidth=1.6,
            label=_plain(line.name),
        )
    if chart.ticks:
        _names(axes, "x", tuple(chart.ticks.values()))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, chart.title, chart.x_title, chart.y_title)
    if len(chart.series) > 1:
        # The labels are passed explicitly because matplotlib leaves out those that begin with an underscore.
        axes.legend(axes.get_lines(), [_plain(line.name) for line in chart.series], frameon=False, fontsize=8)


def _label(axes: Axes, title: str, x_title: str, y_title: str) -> None:
    axes.set_title(_plain(title), loc="left", fontsize=11)
    axes.set_xlabel(_plain(x_title))
    axes.set_ylabel(_plain(y_title))


def _names(axes: Axes, which: str, ticks: tuple[str, ...]) -> None:
    every = -(-len(ticks) // _MOST_TICKS)
    axis = axes.yaxis if which == "y" else axes.xaxis
    shown = range(0, len(ticks), every)
    axis.set_major_locator(FixedLocator(list(shown)))
    axis.set_major_formatter(FixedFormatter([_plain(ticks[index]) for index in shown]))
    wide = which == "x" and sum(len(ticks[index]) + 1 for index in shown) > 70
    axis.set_tick_params(labelsize=8, labelrotation=60 if wide else 0)


def _plain(text: str) -> str:
    """Escape a text for matplotlib: dollars would begin formulas, and control characters cannot be drawn."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text).replace("$", r"\$")
