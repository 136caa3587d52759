"""Tables with a row for each layer: what all names begin with stands once, and many layers are cut to those that tell something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from rich.table import Table

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.display.charts import as_text, common_beginning
from lata_lightning.display.tables import plain_table
from lata_lightning.vectors.provenance import Derivation

MOST_ROWS = 24
"""More layers than this are shown as the first, the last and the extreme ones, unless all are asked for."""
_ENDS = 4
_EXTREMES = 3
_BAR = 8
_MOST_SPARKS = 60
_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def layer_table(
    unit: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    title: str = "",
    *,
    outside: Mapping[str, Sequence[str]] | None = None,
    ranked: Mapping[str, float | None] | None = None,
    ranked_as: str = "",
    every: bool = False,
    hint: str = "",
) -> Table:
    """Return a table of layers.

    Args:
        unit: What a row is: block, submodule, tensor or layer.
        columns: Heads of the figures.
        rows: Figures as text, by layer, in the order of the model.
        title: Above the table.
        outside: Figures of what is in no layer, below a line.
        ranked: The value by which layers are told apart: it gets a bar in every row, decides which extremes are shown, and runs over all layers in a
            line below a table that is cut. None draws nothing.
        ranked_as: What that value is.
        every: Show all layers.
        hint: How to see all layers, for the line that says how many are left out.
    """
    outside, values = outside or {}, {name: value for name, value in (ranked or {}).items() if value is not None}
    names = list(rows)
    # Rows such as "model" and "outside" are no layers.
    prefix = common_beginning([name for name in names if "." in name])
    shown = set(names) if every or len(names) <= MOST_ROWS else _telling(names, values)
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    bars = high > low
    body: list[list[str]] = []
    skipped = 0
    for name in names:
        if name not in shown:
            skipped += 1
            continue
        if skipped:
            body.append([f"… {skipped} more", *[""] * (len(columns) + bars)])
            skipped = 0
        bar = [_bar((values[name] - low) / (high - low)) if name in values else ""] if bars else []
        body.append([name.removeprefix(prefix), *rows[name], *bar])
    if prefix:
        title = f"{title} ({unit}s of {prefix.removesuffix('.')})".lstrip()
    heads = [unit, *columns, *([f"{low:.3g} – {high:.3g}"] if bars else [])]
    below = [[f"{name} (outside)", *cells, *[""] * bars] for name, cells in outside.items()]
    table = plain_table(heads, [*body, *below], title, sections=[len(body)] if below else [])
    table.collapse_padding, table.pad_edge = True, False
    if bars:
        table.columns[-1].justify = "left"
        table.columns[-1].no_wrap = True
    if len(shown) < len(names):
        words = [f"{len(names) - len(shown)} of {len(names)} {unit}s are not shown.{f' {hint}' if hint else ''}"]
        if bars:
            words.append(f"{ranked_as or 'all'}, first to last: {sparkline([values.get(name) for name in names])}")
        table.caption = "\n".join(words)
    return table


def alignment_table(alignment: Alignment, title: str = "", *, cautions: bool = True, every: bool = False, hint: str = "") -> Table:
    """Return the layers of a measurement and, below a line, the tensors outside of them.

    Args:
        alignment: With or without coefficients.
        title: Above the table.
        cautions: Say below the table what there is to know before ranking the layers.
        every: Show all layers, however many there are.
        hint: How to see all layers.
    """
    # Alignments that are too flat to rank by get no bars, which would make a ranking of them.
    ranked = {} if alignment.flat else {layer: stats.alignment for layer, stats in alignment.layers.items()}
    table = layer_table(
        alignment.level,
        ["alignment", "relative norm", "task norm", "coefficient"],
        {layer: _figures(stats) for layer, stats in alignment.layers.items()},
        title,
        outside={name: _figures(stats) for name, stats in alignment.outside.items()},
        ranked=ranked,
        ranked_as="alignment",
        every=every,
        hint=hint,
    )
    sentences = [str(table.caption)] if table.caption else []
    sentences += alignment.cautions() if cautions else []
    if sentences:
        table.caption = "\n".join(sentences)
    return table


def derivation_table(derivation: Derivation, title: str = "", *, every: bool = False, hint: str = "") -> Table:
    """Return what was measured when a vector was made of others: a row for each layer, a column for each measurement."""
    layers = dict.fromkeys(layer for measured in derivation.measured for layer in measured.layers)
    rows = {layer: [as_text(measured.layers.get(layer), ".4g") for measured in derivation.measured] for layer in layers}
    known = {layer: [value for one in derivation.measured if (value := one.layers.get(layer)) is not None] for layer in layers}
    largest = {layer: max(values, default=None) for layer, values in known.items()}
    columns = [measured.title for measured in derivation.measured]
    return layer_table("layer", columns, rows, title, ranked=largest, ranked_as="largest of a layer", every=every, hint=hint)


def sparkline(values: Sequence[float | None]) -> str:
    """Return values as bars of eight heights, one character each, from the smallest to the largest; a blank for none.

    More values than fit on a line are averaged over runs of equal length.
    """
    if len(values) > _MOST_SPARKS:
        edges = [index * len(values) // _MOST_SPARKS for index in range(_MOST_SPARKS + 1)]
        runs = [[value for value in values[begin:end] if value is not None] for begin, end in pairwise(edges)]
        values = [sum(run) / len(run) if run else None for run in runs]
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low
    return "".join(" " if value is None else _LEVELS[round((value - low) / span * 7) if span else 0] for value in values)


def _telling(names: Sequence[str], values: Mapping[str, float]) -> set[str]:
    """The first and last layers, and those with the smallest and the largest values."""
    rising = sorted(values, key=values.__getitem__)
    return {*names[:_ENDS], *names[-_ENDS:], *rising[:_EXTREMES], *rising[-_EXTREMES:]}


def _bar(share: float) -> str:
    """A bar of that share of the full width, never empty, as the smallest value is no missing one."""
    eighths = max(1, round(share * 8 * _BAR))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _figures(stats: LayerStats) -> list[str]:
    if not stats.moved:
        # A layer that did not move says nothing: its alignment of 1 would look like a result.
        stats = replace(stats, alignment=None, relative_norm=None)
    forms = ((stats.alignment, ".4f"), (stats.relative_norm, ".4f"), (stats.task_norm, ".4g"), (stats.coefficient, ".4f"))
    return [as_text(value, form) for value, form in forms]
