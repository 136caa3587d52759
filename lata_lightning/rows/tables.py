"""Opening files and data sets through `datasets`, and splitting their rows into training and validation by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from lata_lightning.errors import LataError, first_line, first_three

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def open_table(source: str | Sequence[str], split: str = "train", subset: str | None = None, *, streaming: bool = False) -> Any:
    """Open files or a data set with `datasets`; an iterable data set when streaming.

    Args:
        source: JSON lines, CSV or Parquet files (paths or patterns, several of one kind), a directory, or the name of a data set on the hub. Only
            the hub needs a network, unless the data set is in the cache and ``HF_HUB_OFFLINE=1``.
        split: Split of a data set on the hub or of a directory; files are one split, ``"train"``.
        subset: Configuration of a data set on the hub.
        streaming: Read rows as they are needed instead of all at once.

    Raises:
        LataError: There is no such file, split or data set, the files are of several kinds or cannot be read, or the split is empty.
    """
    sources = [source] if isinstance(source, str) else list(source)
    files = [file for name in sources for file in _files(name)]
    kinds = {BUILDERS[Path(file).suffix] for file in files}
    if len(kinds) > 1 or (files and len(sources) > len(files)) or (not files and len(sources) != 1):
        raise LataError(f"data must be files of one kind or the name of one data set, got {first_three(sources)}")
    shown = sources[0] if len(sources) == 1 else f"{len(sources)} files"
    try:
        if files:
            return load_dataset(kinds.pop(), data_files=files, split=split, streaming=streaming)
        return load_dataset(sources[0], subset, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        offline = " (HF_HUB_OFFLINE is set, so only local files and the cache are looked at)" if _offline() and not files else ""
        raise LataError(f"cannot read split {split!r} of {shown!r}{offline}: {first_line(error.__cause__ or error)}") from error


def held_out(content: Any, share: float, seed: int) -> bool:
    """Return whether a row belongs to the validation split, which only its content decides.

    A row stays on its side on every machine, in every epoch, after a resume and when rows are added. Equal rows are on the same side.

    Args:
        content: The values of a row, as JSON types or bytes.
        share: Expected share of rows held out, in [0, 1].
        seed: Selects which rows are held out.
    """
    encoded = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    digest = hashlib.sha256(f"{seed}/".encode() + encoded).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def divided(rows: Sequence[Any], contents: Iterable[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows into those to train on and those held out (see ``held_out``); both keep their order.

    Raises:
        LataError: One side would be empty.
    """
    training: list[Any] = []
    validation: list[Any] = []
    for row, content in zip(rows, contents, strict=True):
        (validation if held_out(content, share, seed) else training).append(row)
    if share > 0 and not (training and validation):
        side = "training" if not training else "validation"
        raise LataError(
            f"validation_share {share} of {len(rows)} rows leaves the {side} split empty; give another share, another seed, or validation data of its own"
        )
    return training, validation


def _files(name: str) -> list[str]:
    """Return the local files that a name or pattern matches; none for a directory or a name on the hub."""
    if Path(name).is_dir():
        return []
    matches = sorted(glob(name, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
    unknown = [file for file in matches if Path(file).suffix not in BUILDERS]
    if unknown:
        raise LataError(f"data files end in {', '.join(BUILDERS)}; other endings have {first_three(unknown)}")
    local = Path(name).suffix in BUILDERS or name.startswith((".", "/", "~")) or "*" in name or name.count("/") > 1
    if not matches and local:
        raise LataError(f"there is no file {name!r}, seen from {Path.cwd()}")
    return matches


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
