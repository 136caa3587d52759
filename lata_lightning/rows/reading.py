"""Reading rows from files and data sets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_line
from lata_lightning.rows.tables import BUILDERS, open_table
from lata_lightning.store.directories import json_rows


def read_rows(data: str | Path, count: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a file, or of the ``train`` split of a data set.

    Args:
        data: A file with one JSON object per line, a CSV, Parquet or JSON file, or what ``datasets.load_dataset`` takes: a hub id or a directory.
        count: Read at most so many rows, from the top; by default all.

    Raises:
        SourceError: There is no such file or data set, or it cannot be read.
        CorruptFileError: A line is not a JSON object, or the file is not UTF-8 text.
        LataError: ``count`` is not positive, or there is no row.
    """
    if count is not None and count < 1:
        raise LataError(f"at least one row is needed, not {count}")
    path = Path(data)
    if path.is_file():
        rows = iter(open_table(str(data))) if path.suffix in {*BUILDERS} - {".jsonl"} else _lines(path)
    elif path.suffix in BUILDERS:
        raise SourceError(f"there is no file {str(data)!r}, seen from {Path.cwd()}")
    else:
        rows = _data_set(str(data))
    selected = list(islice(rows, count))
    if not selected:
        raise LataError(f"{data} holds no rows")
    return selected


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # Not splitlines(), which also splits at characters that JSON strings may contain. Some editors write a byte order mark first.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            yield from json_rows(lines, path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read as JSONL: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is no UTF-8 text ({error.reason})") from error


def _data_set(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        # Streamed, because only a few rows of a data set may be needed.
        yield from datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise SourceError(f"{name} is neither a file nor a data set with a split 'train' ({first_line(error)})") from error
