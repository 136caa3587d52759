"""Data sets by name or file, read through `datasets`, and a division of their rows that only their contents decide."""

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
    """A `datasets` data set, or an iterable one when streaming.

    Args:
        source: JSON lines, CSV or Parquet files (paths or patterns, several of one kind), a directory, or the name of a data set on the hub. Only
            the latter needs a network, and none under ``HF_HUB_OFFLINE=1`` if it is in the cache.
        split: Which split to take of a data set on the hub or of a directory; single files are one split, ``"train"``.
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
    """Whether a row belongs to the validation split, which its content alone decides.

    The same row is on the same side on every machine, in every epoch, after a resume and when rows are added, and so are two equal rows.

    Args:
        content: The values of a row: what JSON can hold, or bytes.
        share: Expected share of rows held out, in [0, 1].
        seed: Another seed holds out other rows.
    """
    held = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    digest = hashlib.sha256(f"{seed}/".encode() + held).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def divided(rows: Sequence[Any], contents: Iterable[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows held out, both in their old order (see ``held_out``).

    Raises:
        LataError: One side would be empty.
    """
    kept: list[Any] = []
    held: list[Any] = []
    for row, content in zip(rows, contents, strict=True):
        (held if held_out(content, share, seed) else kept).append(row)
    if share > 0 and not (kept and held):
        side = "training" if not kept else "validation"
        raise LataError(
            f"validation_share {share} of {len(rows)} rows leaves the {side} split empty; give another share, another seed, or validation data of its own"
        )
    return kept, held


def _files(name: str) -> list[str]:
    """Return the local files that a name or pattern matches; none for a directory or a name on the hub."""
    if Path(name).is_dir():
        return []
    found = sorted(glob(name, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
    unknown = [file for file in found if Path(file).suffix not in BUILDERS]
    if unknown:
        raise LataError(f"data files end in {', '.join(BUILDERS)}; other endings have {first_three(unknown)}")
    local = Path(name).suffix in BUILDERS or name.startswith((".", "/", "~")) or "*" in name or name.count("/") > 1
    if not found and local:
        raise LataError(f"there is no file {name!r}, seen from {Path.cwd()}")
    return found


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
