"""What a run leaves behind: the task vector, and the forms in which other tools take it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lata_lightning.errors import LataError
from lata_lightning.exports import EXPORTS, export_to
from lata_lightning.merging.merge import Term
from lata_lightning.merging.weigh import from_instruct
from lata_lightning.store.head_files import HEAD_TENSORS
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.store.writer import PARTIAL_MARK, replace_directory
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import STORED, WEIGHTINGS, follows_alignment


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
        vector: With the coefficients to store.
        handed_over: The same vector with the coefficients to apply in all other forms.
        kinds: From ``check_kinds``.
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


def closing_lines(
    vector: TaskVector, handed_over: TaskVector, kinds: Sequence[str], directory: Path, *, instruction: str | None, head: bool = False
) -> list[str]:
    """Return lines for the log: what a run has written, and which commands go on from there.

    Args:
        vector: As it was stored.
        handed_over: As it was written in other forms.
        kinds: What was written.
        directory: Output directory of the run.
        instruction: Path of the instruction vector, if it is a saved one.
        head: Whether the head of a classifier was saved beside the vector.
    """
    lines = [f"{kind}: {directory / folder(kind)}" for kind in kinds]
    lines += [f"head: {directory / HEAD_TENSORS}, which belongs to this task and is never merged"] if head else []
    others = [kind for kind in kinds if kind != "vector"]
    if others and vector is not handed_over and vector.manifest.coefficients is not None:
        lines.append(
            f"no weighting was asked for (weighting=…) and the alignments are too flat to rank by: coefficient 1 for every tensor in {', '.join(others)}"
        )
    if "vector" in kinds:
        commands = _next_commands(vector, directory, instruction)
        if head:
            commands.insert(1, shlex.join(["lata", "evaluate", "MERGED", "--head", str(directory), "--data", "FILE"]))
        lines += [f"next: {command}" for command in commands]
        lines.append(
            f"with vectors of other tasks: {_merge_with_others(vector, directory)} (one vector of all, without samples or a scale to choose)"
        )
    return lines


def _merge_with_others(vector: TaskVector, directory: Path) -> str:
    """The command that merges the vector with those of other tasks from the same start."""
    start = vector.manifest.start_identity.location or "START"
    return shlex.join(["lata", "merge", start, str(directory / VECTOR_NAME), "OTHER", "--method", "regression", "--output", "MERGED"])


def _next_commands(vector: TaskVector, directory: Path, instruction: str | None) -> list[str]:
    manifest = vector.manifest
    weighted = manifest.coefficients is not None and follows_alignment(manifest.weighting)
    flat = weighted and manifest.alignment is not None and manifest.alignment.flat
    if manifest.start == "base" and manifest.coefficients is not None:
        # The coefficients belong to what is left of the vector without the instruction vector in it.
        merge = ["INSTRUCT", str(directory / VECTOR_NAME), "--instruction", instruction or "INSTRUCTION"]
    else:
        merge = [manifest.start_identity.location or "START", str(directory / VECTOR_NAME)]
    if flat or not weighted:
        merge += ["--weighting", "none"]
    line = shlex.join(["lata", "merge", *merge, "--output", "MERGED"])
    return [
        f"{line} (plain task arithmetic; to rank the layers all the same: --weighting {_asking_for(manifest.weighting)})" if flat else line,
        shlex.join(["lata", "report", str(directory), "--output", "report.html"]),
    ]


def _asking_for(rule: str) -> str:
    return rule if rule in WEIGHTINGS else STORED
