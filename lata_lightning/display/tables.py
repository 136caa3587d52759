"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.vectors.manifest import Derivation


def alignment_table(alignment: Alignment, title: str = "", *, cautions: bool = True) -> Table:
    """Return the layers of a measurement and, below a line, the tensors outside of them.

    Args:
        alignment: With or without coefficients.
        title: Title above the table.
        cautions: Print the reasons against ranking the layers below the table.
    """
    rows = [(layer, *_figures(stats)) for layer, stats in alignment.layers.items()]
    rest = [(f"{name} (outside)", *_figures(stats)) for name, stats in alignment.outside.items()]
    table = plain_table([alignment.level, "alignment", "relative norm", "task norm", "coefficient"], rows, title, sections=[len(rows)])
    for row in rest:
        table.add_row(*row)
    sentences = alignment.cautions() if cautions else []
    if sentences:
        table.caption = "\n".join(sentences)
    return table


def derivation_table(derivation: Derivation, title: str = "") -> Table:
    """Return the measurements of a derivation: a row for each layer, a column for each measurement."""
    layers = dict.fromkeys(layer for measured in derivation.measured for layer in measured.layers)
    rows = [[layer, *(_number(measured.layers.get(layer)) for measured in derivation.measured)] for layer in layers]
    return plain_table(["layer", *(measured.title for measured in derivation.measured)], rows, title)


def plain_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", *, sections: Sequence[int] = (), text: bool = False
) -> Table:
    """Return a table whose first column is text and whose others are figures.

    Args:
        columns: Titles of the columns.
        rows: The cells of each row.
        title: Title above the table.
        sections: Numbers of the rows, from 1, that a line follows.
        text: Whether the other columns are text too.
    """
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="left" if text else "right")
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=number in sections)
    return table


def show(*tables: Table, file: IO[str] | None = None) -> None:
    """Print tables to standard output or to a file, in full width where the output is not a terminal."""
    console = Console(file=file)
    if not console.is_terminal:
        # A pipe has no width; cutting figures to 80 columns would lose them.
        console = Console(file=file, width=200)
    for table in tables:
        console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _figures(stats: LayerStats) -> tuple[str, str, str, str]:
    values = (stats.alignment, stats.relative_norm, stats.task_norm, stats.coefficient)
    alignment, relative, norm, coefficient = (
        "–" if value is None else f"{value:.4g}" if index == 2 else f"{value:.4f}" for index, value in enumerate(values)
    )
    return alignment, relative, norm, coefficient
