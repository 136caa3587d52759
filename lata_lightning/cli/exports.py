"""``lata export``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_checks, note, progress_bar
from lata_lightning.errors import LataError


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors; the coefficients they store weight their layers.")
    parser.add_argument(
        "--to",
        type=Literal["pure", "hf", "peft", "mergekit", "coefficients"],
        required=True,
        help="pure: the vector times its coefficients; hf: a model directory; peft: a LoRA adapter; mergekit: its configuration and models; "
        "coefficients: a table as JSON and CSV.",
    )
    parser.add_argument("--output", required=True, help="Directory to write to; it must not exist yet.")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="One scale for all vectors, or one for each.")
    parser.add_argument("--onto", type=str | None, help="Start model; by default where the first vector records it.")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        help="Precision of the output; by default float32 for differences and factors, that of the start model for whole weights.",
    )
    parser.add_argument("--rank", type=int | None, help="For peft: rank that dense differences are cut down to; 16 without --energy.")
    parser.add_argument("--energy", type=float | None, help="For peft: share of the squared norm of each dense matrix to keep, in (0, 1].")
    add_checks(parser)


def _export(options: Namespace, command: str) -> None:
    from lata_lightning.exports import export_to
    from lata_lightning.merging.merge import Term
    from lata_lightning.vectors.task_vector import TaskVector

    scales = options.scale * len(options.vectors) if len(options.scale) == 1 else options.scale
    if len(scales) != len(options.vectors):
        raise LataError(f"give one scale for all vectors or one for each: got {len(scales)} scales for {len(options.vectors)} vectors")
    terms = [
        Term(TaskVector.open(path, check_config=options.check_config), scale) for path, scale in zip(options.vectors, scales, strict=True)
    ]
    with progress_bar("export") as progress:
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


COMMANDS = {
    "export": Command(
        "Hand vectors over: as a pure vector, a model directory, a peft adapter, mergekit's input, or a table.", _arguments, _export
    ),
}
