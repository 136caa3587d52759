"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table


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
    # Names are broken over lines where a terminal is narrow, never cut off.
    table.add_column(columns[0], overflow="fold")
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
