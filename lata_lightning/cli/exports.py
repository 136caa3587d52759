"""``lata export``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_leave_out, add_weighting, note, progress_bar, weighed
from lata_lightning.cli.writing import add_writing, applying
from lata_lightning.errors import LataError
from lata_lightning.exports import Export
from lata_lightning.store.dtypes import FloatName

if TYPE_CHECKING:
    from lata_lightning.vectors.task_vector import TaskVector


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors.")
    parser.add_argument(
        "--to",
        type=Export,
        required=True,
        help="pure: the vector times its coefficients; hf: a model directory; peft: a LoRA adapter; mergekit: its configuration and models; "
        "coefficients: a table as JSON and CSV.",
    )
    parser.add_argument("--output", required=True, help="Directory to write to; it must not exist yet.")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="One scale for all vectors, or one for each.")
    parser.add_argument("--onto", type=str | None, help="Start model; by default where the first vector records it.")
    parser.add_argument(
        "--dtype",
        type=FloatName | None,
        help="Precision of the output; by default float32 for differences and factors, that of the start model for whole weights.",
    )
    parser.add_argument("--rank", type=int | None, help="For peft: rank that dense differences are cut down to; 16 without --energy.")
    parser.add_argument("--energy", type=float | None, help="For peft: share of the squared norm of each dense matrix to keep, in (0, 1].")
    add_weighting(parser, "linear")
    add_leave_out(parser)
    add_writing(parser, hub=True)


def _export(options: Namespace, command: str) -> None:
    from lata_lightning.exports import export_to
    from lata_lightning.merging.merge import Term
    from lata_lightning.merging.weigh import weigh
    from lata_lightning.store.names import LeaveOut
    from lata_lightning.vectors.task_vector import TaskVector

    if options.push_to_hub is not None and options.to in ("mergekit", "coefficients"):
        raise LataError(f"--push-to-hub is for vectors, adapters and models; --to {options.to} writes none of them")
    scales = options.scale * len(options.vectors) if len(options.scale) == 1 else options.scale
    if len(scales) != len(options.vectors):
        raise LataError(f"give one scale for all vectors or one for each: got {len(scales)} scales for {len(options.vectors)} vectors")
    leave_out, given = LeaveOut(options.leave_out), [_vector(options, path) for path in options.vectors]
    leave_out.check_used([name for vector in given for name in vector], ", ".join(options.vectors))
    instruction = None if options.instruction is None else TaskVector.open(options.instruction, check_config=options.check_config)
    vectors = [weighed(options, vector.leaving_out(leave_out), instruction, "linear") for vector in given]
    if options.to == "pure" and options.weighting == "none":
        # A pure vector needs coefficients, even if all of them are 1.
        vectors = [weigh(vector, "none", alignment=vector.manifest.alignment) for vector in vectors]
    terms = [Term(vector, scale) for vector, scale in zip(vectors, scales, strict=True)]
    with applying(terms), progress_bar("export") as progress:
        output = export_to(
            options.to,
            terms,
            options.output,
            onto=options.onto,
            dtype=options.dtype,
            rank=options.rank,
            energy=options.energy,
            check_base=options.check_base,
            command=command,
            progress=progress,
            note=note,
        )
    sys.stdout.write(f"{options.output}\n")
    if options.to == "pure":
        loss = TaskVector.open(output).manifest.precision_loss
        if loss is not None:
            cosine = "undefined" if loss.cosine is None else f"{loss.cosine:.6f}"
            note(f"{options.dtype} made {loss.zero_fraction:.2%} of the nonzero entries zero; cosine to the full-precision vector {cosine}")
    if options.to == "peft":
        error = json.loads((Path(output) / "reconstruction.json").read_text("utf-8"))["all"]
        if error is not None:
            note(f"the adapter differs from the weighted vectors by {error:.3g} of their norm; by layer in reconstruction.json")


def _vector(options: Namespace, path: str) -> TaskVector:
    from lata_lightning.vectors.task_vector import TaskVector

    vector = TaskVector.open(path, check_config=options.check_config)
    return vector if options.start is None else TaskVector(vector.tensors, replace(vector.manifest, start=options.start))


COMMANDS = {
    "export": Command(
        "Hand vectors over: as a pure vector, a model directory, a peft adapter, mergekit's input, or a table.", _arguments, _export
    ),
}
