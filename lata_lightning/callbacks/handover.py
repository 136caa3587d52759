"""What a run leaves behind: the task vector, and the forms in which other tools take it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lata_lightning.errors import LataError
from lata_lightning.exports import EXPORTS, export_to
from lata_lightning.merging.merge import Term
from lata_lightning.merging.weigh import from_instruct
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.store.writer import PARTIAL_MARK, replace_directory
from lata_lightning.vectors.task_vector import TaskVector


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of export, the vector first; refuse any other word with a list of the choices."""
    choices = ("vector", *EXPORTS)
    if isinstance(kinds, str) or set(kinds) - set(choices):
        raise LataError(f"export must be a sequence of words among {', '.join(choices)}, or empty, got {kinds!r}")
    return tuple(kind for kind in choices if kind in kinds)


def folder(kind: str) -> str:
    """Return the name of the folder a kind of export is written to, inside the output directory of a run."""
    return VECTOR_NAME if kind == "vector" else kind


def write_exports(
    vector: TaskVector,
    handed_over: TaskVector,
    kinds: Sequence[str],
    directory: Path,
    *,
    dtype: str,
    instruction: TaskVector | None,
    note: Callable[[str], None],
) -> None:
    """Write a vector in every form that is wanted, each whole or not at all.

    Args:
        vector: The vector, with the coefficients to store.
        handed_over: The same vector with the coefficients to apply in all other forms.
        kinds: The exports to write, as ``check_kinds`` returns them.
        directory: Output directory of the run; what lies there under the same name is replaced.
        dtype: Precision of the vector and the pure vector.
        instruction: Taken off before a hand-over, where the vector started from base.
        note: Takes remarks for the log.
    """
    for kind in kinds:
        partial = directory / f".{folder(kind)}{PARTIAL_MARK}new"
        shutil.rmtree(partial, ignore_errors=True)
        # Under its final name, which cards show.
        made = partial / folder(kind)
        if kind == "vector":
            vector.save(made, dtype=dtype)
        else:
            counted = handed_over.manifest.coefficients is not None
            term = Term(from_instruct(handed_over, instruction) if counted else handed_over)
            export_to(kind, [term], made, dtype=dtype if kind == "pure" else None, note=note)
        replace_directory(made, directory / folder(kind))
        partial.rmdir()
