"""The output directory of a run: the names in it, whether a fresh run may write there, and what an unfinished one has left."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from lata_lightning.errors import OutputError, differing
from lata_lightning.store.writer import PARTIAL_MARK

HISTORY_NAME = "history.jsonl"
VECTOR_NAME = "task_vector"
SPILL_NAME = "start_weights"
RUN_NAME = "run.json"
"""Lies in the directory while a run is unfinished, and records the fingerprint of its start weights."""


def check_output(directory: Path, start: Mapping[str, list[int]], results: Iterable[str]) -> str | None:
    """Refuse a directory that a fresh run must not write into, and make one that does not exist.

    A run may write where an unfinished run from the same start weights wrote: that run begins anew.

    Args:
        directory: Output directory.
        start: Fingerprint of the start weights: two sums over the bits of each tensor.
        results: Names of the folders the run is going to write at its end.

    Returns:
        A sentence for the log where the run takes the place of an unfinished one; None in an empty directory.

    Raises:
        OutputError: The directory cannot be written to, or holds the output of another run.
    """
    present = [name for name in results if (directory / name).exists()]
    advice = "Give this run an output_dir of its own, or remove it."
    if present:
        raise OutputError(f"{directory} holds the {present[0]} of another run. {advice}")
    left = [name for name in (HISTORY_NAME, SPILL_NAME) if (directory / name).exists()]
    if left:
        recorded = _recorded_start(directory)
        if recorded is None:
            raise OutputError(f"{directory} holds the {left[0]} of another run. {advice}")
        names = {*recorded, *start}
        other = {name for name in names if recorded.get(name) != start.get(name)}
        if other:
            raise OutputError(
                f"{directory} holds the {left[0]} of an unfinished run that started from other weights; {differing(other, len(names))}. {advice} "
                "Are new layers drawn with another seed each time? Call seed_everything before the model is built."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise OutputError(f"the output_dir {directory} cannot be written to: {error.strerror}. Give another output_dir.") from error
    if not left:
        return None
    return f"{directory} holds an unfinished run from the same start weights; it begins anew, with a new history"


def begin_output(directory: Path, start: Mapping[str, list[int]]) -> None:
    """Note the start of a fresh run, and remove what an unfinished one has left."""
    # The note comes last: without it, what is left would be that of another run.
    (directory / HISTORY_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory / SPILL_NAME, ignore_errors=True)
    remove_partial_output(directory)
    partial = directory / f".{RUN_NAME}{PARTIAL_MARK}"
    partial.write_text(json.dumps({"start": dict(start)}) + "\n", "utf-8")
    partial.replace(directory / RUN_NAME)


def remove_partial_output(directory: Path) -> None:
    """Remove what a run that was killed was about to write."""
    for partial in directory.glob(f".*{PARTIAL_MARK}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def end_output(directory: Path) -> None:
    """Note that the run is finished."""
    (directory / RUN_NAME).unlink(missing_ok=True)


def _recorded_start(directory: Path) -> dict[str, list[int]] | None:
    try:
        recorded = json.loads((directory / RUN_NAME).read_text("utf-8"))["start"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return recorded if isinstance(recorded, dict) else None
