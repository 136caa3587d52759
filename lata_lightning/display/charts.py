"""What a figure shows, whatever draws it: its values, its words, and the same as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lata_lightning.alignment import Alignment

MAX_TICK = 22
"""Characters of a label on an axis; hover texts and tables have it whole."""


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column.

    Attributes:
        key: Lower-case letters, digits and hyphens; a file name and an anchor.
        title, summary: What is shown, and in words what there is to see.
        rows, columns: Their names, each of them unique; the first row is at the top.
        values: By row, then by column; None where there is none.
        row_title, column_title, value_title: What the names and the values are.
        row_ticks, column_ticks: Shorter names for the axes.
        form: Format of a value, such as ``.4f``.
        bounds: Ends of the colour scale; by default those of the values.
        diverging: Whether the values lie on both sides of zero, which then is the middle of the scale.
        muted: Whether the differences say nothing; then they are drawn in grey.
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
        """Ends of the colour scale: never the same, so that equal values have a colour."""
        known = [value for row in self.values for value in row if value is not None]
        low, high = self.bounds or (min(known, default=0.0), max(known, default=1.0))
        if self.diverging:
            high = max(abs(low), abs(high))
            low = -high
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of the same values as text."""
        body = [[name, *(as_text(value, self.form) for value in values)] for name, values in zip(self.rows, self.values, strict=True)]
        return [self.row_title, *self.columns], body


class Series(NamedTuple):
    """One line.

    Attributes:
        name: In the legend.
        colour: Number of its colour.
        points: Its values, by number or by name on the horizontal axis.
        muted: Whether the differences along it say nothing; then it is drawn in grey.
    """

    name: str
    colour: int
    points: Mapping[float | str, float | None]
    muted: bool = False


@dataclass(frozen=True)
class Lines:
    """Series over steps, scales or layers.

    Attributes:
        key, title, summary: As of a heat map.
        x_title, y_title: What stands on the axes.
        series: The lines; their points are by number, or all by the names in ``ticks``.
        ticks: Names on the horizontal axis in order, with shorter ones to show; empty for an axis of numbers.
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
        """Heads and rows of the same values as text: a row for each place on the horizontal axis."""
        places: list[float | str] = (
            list(self.ticks) if self.ticks else sorted({place for line in self.series for place in line.points}, key=float)
        )
        body = [
            [place if isinstance(place, str) else f"{place:g}", *(as_text(line.points.get(place), self.form) for line in self.series)]
            for place in places
        ]
        return [self.x_title, *(line.name for line in self.series)], body


Chart = HeatMap | Lines


def as_text(value: float | None, form: str) -> str:
    """A value as text; a dash for none."""
    return "–" if value is None else format(value, form)


def short_names(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Names without the components they all begin with, and those components; a single name stays as it is."""
    split = [name.split(".") for name in names]
    common = 0
    if len(names) > 1:
        while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
            common += 1
    return tuple(clip(".".join(parts[common:])) for parts in split), ".".join(split[0][:common]) if names else ""


def clip(name: str) -> str:
    """A name that fits on an axis: its end is what tells layers apart."""
    return name if len(name) <= MAX_TICK else "…" + name[1 - MAX_TICK :]


def axis_title(what: str, prefix: str) -> str:
    """Title of an axis of layers whose names were cut by a common beginning."""
    return f"{what} of {prefix}" if prefix else what


def alignment_over_training(
    measured: Sequence[tuple[int, int, Alignment]],
    key: str = "alignment",
    title: str = "Alignment over training",
    bounds: tuple[float, float] | None = None,
) -> HeatMap | None:
    """Heat map of alignment, layer by measurement.

    Args:
        measured: Step, epoch (from 0) and alignment of each measurement, oldest first.
        key: Of the chart.
        title: Of the chart.
        bounds: Ends of the colour scale.

    Returns:
        The chart; None where no alignment is known. Measurements by other layers than those of the last one, of a run that was resumed with
        another level, are left out, and the summary says so.
    """
    if not measured or not measured[-1][2].values:
        return None
    last = measured[-1][2]
    shown = [entry for entry in measured if list(entry[2].layers) == list(last.layers)]
    layers, steps = list(last.layers), [step for step, _, _ in shown]
    ticks, prefix = short_names(layers)
    values = tuple(tuple(alignment.layers[layer].alignment for _, _, alignment in shown) for layer in layers)
    words = [f"{len(layers)} {last.level}s, {_measurements(steps)}.", f"At the last one: {extremes(last.values, '.4f')}."]
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
        rows=tuple(layers),
        columns=tuple(f"step {step}, epoch {epoch}" for step, epoch, _ in shown),
        values=values,
        row_title=axis_title(last.level, prefix),
        column_title="optimizer steps",
        value_title="alignment",
        row_ticks=ticks,
        column_ticks=tuple(str(step) for step in steps),
        bounds=bounds,
        muted=last.flat,
    )


def ink_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever stands out more from a colour; its channels are in [0, 1], in sRGB.

    Source: WCAG 2.2, contrast ratio; never below 4.5.
    """
    light = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue))
    luminance = sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), light, strict=True))
    # The contrasts with black and with white are the same here: (L + 0.05)² = 0.05 · 1.05.
    return "#000000" if luminance > 0.179 else "#ffffff"


def extremes(values: Mapping[str, float], form: str) -> str:
    """Smallest and largest of some values and whose they are, as part of a sentence."""
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[least] == values[most]:
        return f"{format(values[least], form)} ({least if len(values) == 1 else 'all of them'})"
    return f"{format(values[least], form)} ({least}) to {format(values[most], form)} ({most})"


def _measurements(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"one measurement, at step {steps[0]}"
    return f"{len(steps)} measurements from step {steps[0]} to step {steps[-1]}"
