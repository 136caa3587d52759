"""What a run leaves behind: the task vector, and the forms in which other tools take it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lata_lightning.errors import LataError
from lata_lightning.exports import EXPORTS, export_to
from lata_lightning.merging.merge import Term
from lata_lightning.store.writer import PARTIAL_MARK, replace_directory
from lata_lightning.vectors.task_vector import TaskVector

VECTOR_NAME = "task_vector"


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds themselves, the vector first; an error that lists the choices if there is another one among them."""
    choices = ("vector", *EXPORTS)
    if isinstance(kinds, str) or set(kinds) - set(choices):
        raise LataError(f"export must be a sequence of words among {', '.join(choices)}, or empty, got {kinds!r}")
    return tuple(kind for kind in choices if kind in kinds)


def folder(kind: str) -> str:
    """Name of the folder a kind of export is written to, inside the output directory of a run."""
    return VECTOR_NAME if kind == "vector" else kind


def write_exports(vector: TaskVector, kinds: Sequence[str], directory: Path, *, dtype: str, instruction: TaskVector | None) -> None:
    """Write a vector in every form that is wanted, each whole or not at all.

    Args:
        vector: With its coefficients.
        kinds: From ``check_kinds``.
        directory: Output directory of the run; what stands there under the same name is replaced.
        dtype: Precision of the vector and the pure vector.
        instruction: Taken off before a hand-over, where the vector started from base.
    """
    for kind in kinds:
        workshop = directory / f".{folder(kind)}{PARTIAL_MARK}new"
        shutil.rmtree(workshop, ignore_errors=True)
        # Under its final name, which cards show.
        made = workshop / folder(kind)
        if kind == "vector":
            vector.save(made, dtype=dtype)
        else:
            counted = vector.start == "base" and vector.manifest.coefficients is not None and instruction is not None
            term = Term(vector.without(instruction) if counted and instruction is not None else vector)
            export_to(
                kind, [term], made, dtype=dtype if kind == "pure" else None, note=lambda remark: rank_zero_info(f"LATACallback: {remark}")
            )
        replace_directory(made, directory / folder(kind))
        workshop.rmdir()
        rank_zero_info(f"LATACallback: {kind}: {directory / folder(kind)}")
