"""What a run says at its end: a table of the layers, and three lines about what was written, what a ranking is worth, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lata_lightning.alignment import Alignment
from lata_lightning.callbacks.handover import folder
from lata_lightning.display.charts import as_text
from lata_lightning.display.layer_tables import alignment_table, layer_table
from lata_lightning.store.head_files import HEAD_TENSORS
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import STORED, WEIGHTINGS, follows_alignment

WITHOUT_INSTRUCTION = (
    "norms only, as there is no instruction vector: LATACallback(instruction_vector=(BASE, INSTRUCT)) would also show how far each layer is aligned with "
    "instruction following, which the layers of a merge can be weighted by; lata align measures it afterwards"
)
_HINT = "history.jsonl holds them all."


def end_table(measured: Alignment, title: str) -> Table:
    """Return the table of the layers: with alignments where an instruction vector was given, otherwise with norms alone.

    What there is to know before ranking the layers is left to ``closing_lines``.
    """
    if measured.values:
        return alignment_table(measured, title, cautions=False, hint=_HINT)
    norms = {layer: stats.task_norm for layer, stats in measured.layers.items()}
    rest = {name: [as_text(stats.task_norm, ".4g")] for name, stats in measured.outside.items()}
    rows = {layer: [as_text(norm, ".4g")] for layer, norm in norms.items()}
    return layer_table(measured.level, ["task norm"], rows, title, outside=rest, ranked=norms, ranked_as="task norm", hint=_HINT)


def closing_lines(
    vector: TaskVector, handed_over: TaskVector, kinds: Sequence[str], directory: Path, *, instruction: str | None, head: bool = False
) -> list[str]:
    """Return three lines for the log: what a run has written, what a ranking of its layers is worth, and the next commands.

    Args:
        vector: As it was stored.
        handed_over: As it was written in other forms.
        kinds: What was written.
        directory: Output directory of the run.
        instruction: Path of the instruction vector, if it is a saved one.
        head: Whether the head of a classifier was saved beside the vector.
    """
    written = [str(directory / folder(kind)) for kind in kinds]
    written += [f"{directory / HEAD_TENSORS} (the head of this task, which is never merged)"] if head else []
    lines = [f"wrote {', '.join(written)}"] if written else []
    lines.append(ranking_line(vector))
    others = [kind for kind in kinds if kind != "vector"]
    if others and vector is not handed_over and vector.manifest.coefficients is not None:
        lines[-1] += f"; every tensor has coefficient 1 in {', '.join(others)}, as no weighting was asked for (weighting=…)"
    commands = [shlex.join(["lata", "report", str(directory), "--output", "report.html"])]
    if head and "vector" in kinds:
        commands.insert(0, shlex.join(["lata", "evaluate", "MERGED", "--head", str(directory), "--data", "FILE"]))
    if "vector" in kinds:
        commands.insert(0, _merge_command(vector, directory, instruction))
        commands.append(f"with vectors of other tasks {_merge_with_others(vector, directory)}")
    return [*lines, f"next: {'; '.join(commands)}"]


def ranking_line(vector: TaskVector) -> str:
    """Return a sentence about what a ranking of the layers by their alignments is worth."""
    manifest = vector.manifest
    alignment = manifest.alignment
    if alignment is None:
        return WITHOUT_INSTRUCTION
    if manifest.coefficients is None:
        return "ranking: none, the vector has no coefficients"
    if not _ranked(vector):
        return f"ranking: none, the coefficients are those of the rule {manifest.weighting!r}"
    worth = " ".join(alignment.cautions()).removesuffix(".")
    if alignment.flat:
        rule = manifest.weighting if manifest.weighting in WEIGHTINGS else STORED
        return f"ranking: {worth}. Below it is plain task arithmetic; --weighting {rule} ranks them all the same"
    spread = f"the alignments spread by {alignment.spread:.4f}, enough to rank the layers by"
    return f"ranking: {worth or spread}; whether it helps, lata tune measures"


def _ranked(vector: TaskVector) -> bool:
    return vector.manifest.coefficients is not None and follows_alignment(vector.manifest.weighting)


def _merge_with_others(vector: TaskVector, directory: Path) -> str:
    """The command that makes one vector of this one and those of other tasks, which needs no samples and no scale."""
    start = vector.manifest.start_identity.location or "START"
    return shlex.join(["lata", "merge", start, str(directory / VECTOR_NAME), "OTHER", "--method", "regression", "--output", "MERGED"])


def _merge_command(vector: TaskVector, directory: Path, instruction: str | None) -> str:
    manifest = vector.manifest
    flat = manifest.alignment is not None and manifest.alignment.flat
    if manifest.start == "base" and manifest.coefficients is not None:
        # The coefficients belong to what is left of the vector without the instruction vector in it.
        words = ["INSTRUCT", str(directory / VECTOR_NAME), "--instruction", instruction or "INSTRUCTION"]
    else:
        words = [manifest.start_identity.location or "START", str(directory / VECTOR_NAME)]
    if not _ranked(vector) or flat:
        words += ["--weighting", "none"]
    return shlex.join(["lata", "merge", *words, "--output", "MERGED"])
