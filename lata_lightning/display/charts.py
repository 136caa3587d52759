"""Charts as plain data, independent of the library that draws them: values, titles, a summary in words, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lata_lightning.alignment import Alignment

MAX_TICK = 22
"""Largest number of characters of a label on an axis; hover texts and tables show the whole name."""


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column.

    Attributes:
        key: Lower-case letters, digits and hyphens; used as file name and anchor.
        title, summary: Title of the chart, and a summary of its values in words.
        rows, columns: Unique names; the first row is at the top.
        values: By row, then by column; None where there is none.
        row_title, column_title, value_title: Titles of the axes and of the values.
        row_ticks, column_ticks: Shorter names for the axes.
        form: Format of a value, such as ``.4f``.
        bounds: Ends of the colour scale; by default the smallest and largest value.
        diverging: Whether the colour scale is centred at zero.
        muted: Whether to draw in grey, because the differences mean nothing.
    """

    key: str
    title: str
    summary: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    row_title: str
    column_title: str
    value_title: str
    row_ticks: tuple[str, ...]
    column_ticks: tuple[str, ...]
    form: str = ".4f"
    bounds: tuple[float, float] | None = None
    diverging: bool = False
    muted: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the colour scale, which always differ, so that equal values have a colour."""
        known = [value for row in self.values for value in row if value is not None]
        low, high = self.bounds or (min(known, default=0.0), max(known, default=1.0))
        if self.diverging:
            high = max(abs(low), abs(high))
            low = -high
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads and rows of the values as text."""
        body = [[name, *(as_text(value, self.form) for value in values)] for name, values in zip(self.rows, self.values, strict=True)]
        return [self.row_title, *self.columns], body


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
        name: Name in the legend.
        colour: Number of its colour.
        points: Its values, by number or by name on the x axis.
        muted: Whether to draw it in grey, because the differences along it mean nothing.
    """

    name: str
    colour: int
    points: Mapping[float | str, float | None]
    muted: bool = False


@dataclass(frozen=True)
class Lines:
    """A line chart over steps, scales or layers.

    Attributes:
        key, title, summary: As for a heat map.
        x_title, y_title: Titles of the axes.
        series: The lines; their points are by number, or all by the names in ``ticks``.
        ticks: The names on the x axis in order, with shorter names to show; empty for an axis of numbers.
        form: Format of a value.
    """

    key: str
    title: str
    summary: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    ticks: Mapping[str, str] = field(default_factory=dict)
    form: str = ".4g"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads and rows of the values as text, one row for each point on the x axis."""
        points: list[float | str] = (
            list(self.ticks) if self.ticks else sorted({point for line in self.series for point in line.points}, key=float)
        )
        body = [
            [point if isinstance(point, str) else f"{point:g}", *(as_text(line.points.get(point), self.form) for line in self.series)]
            for point in points
        ]
        return [self.x_title, *(line.name for line in self.series)], body


Chart = HeatMap | Lines


def as_text(value: float | None, form: str) -> str:
    """Format a value; a dash for None."""
    return "–" if value is None else format(value, form)


def short_names(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Split names into what is left without their common leading components, and these components; a single name is not shortened."""
    prefix = common_beginning(names)
    return tuple(clip(name.removeprefix(prefix)) for name in names), prefix.removesuffix(".")


def common_beginning(names: Sequence[str]) -> str:
    """Return the components that all names begin with, dot included; nothing for a single name, and never a whole name."""
    split = [name.split(".") for name in names]
    common = 0
    if len(names) > 1:
        while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
            common += 1
    return "".join(f"{part}." for part in split[0][:common]) if names else ""


def clip(name: str) -> str:
    """Cut a name to fit on an axis, keeping its end, which tells layers apart."""
    return name if len(name) <= MAX_TICK else "…" + name[1 - MAX_TICK :]


def axis_title(what: str, prefix: str) -> str:
    """Return the title of an axis of layers whose common prefix was removed."""
    return f"{what} of {prefix}" if prefix else what


def alignment_over_training(
    measured: Sequence[tuple[int, int | None, Alignment]],
    key: str = "alignment",
    title: str = "Alignment over training",
    bounds: tuple[float, float] | None = None,
) -> HeatMap | None:
    """Return a heat map of alignment: a row for each measurement, a column for each layer, as in every chart of layers.

    Args:
        measured: Step, epoch (from 0; None where a loop has none) and alignment of each measurement, oldest first.
        key: Key of the chart.
        title: Title of the chart.
        bounds: Ends of the colour scale.

    Returns:
        The chart; None where no alignment is known. Measurements with other layers than the last one, from before a resume with another level, are left
        out, and the summary says so.
    """
    if not measured or not measured[-1][2].values:
        return None
    last = measured[-1][2]
    shown = [entry for entry in measured if list(entry[2].layers) == list(last.layers)]
    layers, steps = list(last.layers), [step for step, _, _ in shown]
    ticks, prefix = short_names(layers)
    values = tuple(
        tuple(stats.alignment if (stats := alignment.layers[layer]).moved else None for layer in layers) for _, _, alignment in shown
    )
    moved = {layer: value for layer, value in last.values.items() if last.layers[layer].moved}
    ended = f"At the last one: {extremes(moved, '.4f')}." if moved else "No layer has moved."
    words = [f"{len(layers)} {last.level}s, {_measurements(steps)}.", ended]
    if last.flat:
        words.append(f"Spread {last.spread:.4f}: too flat to rank, so it is drawn in grey.")
    if last.undefined:
        words.append(f"Undefined in {len(last.undefined)} of them, where the instruction vector is zero.")
    if len(shown) < len(measured):
        words.append(f"Earlier measurements by other layers, not shown: {len(measured) - len(shown)}.")
    return HeatMap(
        key=key,
        title=title,
        summary=" ".join(words),
        rows=tuple(f"step {step}" if epoch is None else f"step {step}, epoch {epoch}" for step, epoch, _ in shown),
        columns=tuple(layers),
        values=values,
        row_title="optimizer steps",
        column_title=axis_title(last.level, prefix),
        value_title="alignment",
        row_ticks=tuple(str(step) for step in steps),
        column_ticks=ticks,
        bounds=bounds,
        muted=last.flat,
    )


def ink_on(red: float, green: float, blue: float) -> str:
    """Return black or white, whichever has more contrast with a colour, whose channels are sRGB in [0, 1].

    Source: WCAG 2.2, contrast ratio; never below 4.5.
    """
    light = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue))
    luminance = sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), light, strict=True))
    # The contrasts with black and with white are the same here: (L + 0.05)² = 0.05 · 1.05.
    return "#000000" if luminance > 0.179 else "#ffffff"


def extremes(values: Mapping[str, float], form: str) -> str:
    """Return the smallest and the largest value and their names, as part of a sentence."""
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[least] == values[most]:
        return f"{format(values[least], form)} ({least if len(values) == 1 else 'all of them'})"
    return f"{format(values[least], form)} ({least}) to {format(values[most], form)} ({most})"


def _measurements(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"one measurement, at step {steps[0]}"
    return f"{len(steps)} measurements from step {steps[0]} to step {steps[-1]}"
