"""``lata extract``, ``align``, ``inspect`` and ``verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import (
    ALL_LAYERS,
    Command,
    add_all,
    add_check_config,
    add_checks,
    add_format,
    add_leave_out,
    add_model,
    add_start,
    add_workers,
    note,
    print_json,
    progress_bar,
)
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import WeightingError
from lata_lightning.layers import Level
from lata_lightning.store.dtypes import FloatName
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting


def _extract_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("start_model", metavar="START", help="Weights the fine-tune started from: directory, .ckpt or hub id.")
    parser.add_argument("tuned_model", metavar="TUNED", help="Weights it ended with.")
    parser.add_argument("--output", required=True, help="Directory to write the vector to.")
    parser.add_argument("--kind", type=Literal["task", "instruction"], default="task", help="'instruction' for instruct − base.")
    parser.add_argument("--start", type=Literal["instruct", "base"], default="instruct", help="Which model START is.")
    parser.add_argument("--dtype", type=FloatName, default="float32", help="Precision to store the vector in.")
    parser.add_argument(
        "--vocabulary",
        type=Literal["start", "tuned"] | None,
        help="Where vocabularies differ: whose tokens the vector has. Tokens that one side lacks get no difference: they are zero, or left out. By "
        "default such models are refused.",
    )
    add_leave_out(parser)
    parser.add_argument("--layers", type=str | None, help="Regular expression that finds the block in a tensor name, for unknown layouts.")
    add_check_config(parser)
    add_model(parser)
    add_workers(parser)
    add_writing(parser, hub=True)


def _extract(options: Namespace, command: str) -> None:
    from lata_lightning.merging.vocabularies import between_vocabularies
    from lata_lightning.store.companions import note_on_modules
    from lata_lightning.store.directories import local_directory
    from lata_lightning.store.opening import narrowed
    from lata_lightning.vectors.task_vector import TaskVector

    start, tuned = narrowed([options.start_model, options.tuned_model], options.model)
    settings = {
        "kind": options.kind,
        "start_kind": options.start,
        "layers": options.layers,
        "check_config": options.check_config,
        "leave_out": options.leave_out,
    }
    if options.vocabulary is None:
        vector = TaskVector.between(start, tuned, **settings)
    else:
        vector, sentences = between_vocabularies(start, tuned, options.vocabulary, **settings)
        for sentence in sentences:
            note(sentence)
    folders = [local_directory(str(path)) for path in (options.start_model, options.tuned_model)]
    modules = note_on_modules(folders[0], folders[1], options.tuned_model, "they are no part of the vector")
    if modules is not None:
        note(modules)
    with progress_bar("extract") as progress:
        saved = vector.save(options.output, dtype=options.dtype, workers=options.workers, progress=progress)
    blocks = len(saved.layers.blocks)
    sys.stdout.write(f"{options.output}: {len(saved)} tensors, {blocks} blocks, {len(saved.layers.outside())} tensors outside of them\n")
    if saved.manifest.precision_loss is not None:
        loss = saved.manifest.precision_loss
        cosine = "undefined" if loss.cosine is None else f"{loss.cosine:.6f}"
        note(f"{options.dtype} made {loss.zero_fraction:.2%} of the nonzero entries zero; cosine to the full-precision vector {cosine}")


def _align_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("vector", metavar="VECTOR", help="Task vector to measure.")
    parser.add_argument("--instruction", type=str | None, help="Instruction vector (instruct − base) to measure the alignment with.")
    parser.add_argument(
        "--weighting",
        type=Weighting,
        default="linear",
        help="Rule for the coefficients that are shown.",
    )
    parser.add_argument("--level", type=Level, default="block", help="Unit of the coefficients.")
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, help="For the rule 'threshold': layers aligned this far get coefficient 0."
    )
    parser.add_argument("--outside", type=float, default=0.0, help="Coefficient of whatever is in no layer, under a rule.")
    add_start(parser)
    add_format(parser)
    add_all(parser)


def _align(options: Namespace, command: str) -> None:
    from lata_lightning.display.layer_tables import alignment_table
    from lata_lightning.display.tables import show
    from lata_lightning.errors import LataError
    from lata_lightning.merging.weigh import weigh
    from lata_lightning.vectors.aligning import align
    from lata_lightning.vectors.task_vector import TaskVector

    if options.instruction is None:
        raise LataError(
            "alignment is measured against an instruction vector: give --instruction VECTOR (lata extract BASE INSTRUCT makes one)"
        )
    vector, instruction = (TaskVector.open(path, check_config=options.check_config) for path in (options.vector, options.instruction))
    alignment = align(vector, instruction, options.level, options.start, check_base=options.check_base)
    try:
        settings = {"threshold": options.threshold, "outside": options.outside}
        weighted = weigh(vector, options.weighting, instruction, alignment=alignment, **settings)
        alignment = weighted.manifest.alignment or alignment
    except WeightingError as error:
        note(f"no coefficients: {error}")
    if options.format == "json":
        print_json({**alignment.to_json(), **alignment.ranking()})
    else:
        title = f"{options.vector} along {options.instruction}"
        show(alignment_table(alignment, title, cautions=False, every=options.all, hint=ALL_LAYERS))
    for sentence in () if options.weighting == "none" else alignment.cautions():
        note(sentence)


def _project_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("vector", metavar="VECTOR", help="Task vector to project.")
    parser.add_argument("--instruction", required=True, help="Instruction vector (instruct − base) whose component is removed.")
    parser.add_argument("--output", required=True, help="Directory to write the projected vector to.")
    parser.add_argument("--level", type=Level, default="tensor", help="Unit that is projected.")
    parser.add_argument("--dtype", type=FloatName, default="float32", help="Precision to store the vector in.")
    add_checks(parser)
    add_workers(parser)
    add_writing(parser, hub=True)


def _project(options: Namespace, command: str) -> None:
    from lata_lightning.store.writer import check_free_directory
    from lata_lightning.vectors.projection import project
    from lata_lightning.vectors.task_vector import TaskVector

    check_free_directory(Path(options.output))
    vector, instruction = (TaskVector.open(path, check_config=options.check_config) for path in (options.vector, options.instruction))
    projected = project(vector, instruction, level=options.level, check_base=options.check_base)
    with progress_bar("project") as progress:
        saved = projected.save(options.output, dtype=options.dtype, workers=options.workers, progress=progress)
    derivation = saved.manifest.derivation
    measured = () if derivation is None else derivation.measured
    shares = [share for taken in measured for share in taken.layers.values() if share is not None]
    sys.stdout.write(
        f"{options.output}: {len(saved)} tensors; {min(shares):.3f} to {max(shares):.3f} times {options.instruction} was taken off a layer\n"
    )


def _path_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="Task vector, merged model, model directory or checkpoint.")


def _inspect_arguments(parser: ArgumentParser) -> None:
    _path_arguments(parser)
    add_model(parser)
    add_format(parser)


def _inspect(options: Namespace, command: str) -> None:
    from lata_lightning.display.tables import plain_table, show
    from lata_lightning.vectors.inspection import describe

    facts = describe(options.path, options.model)
    if options.format == "json":
        print_json(facts)
    else:
        show(plain_table(["", options.path], [(key, _text(value)) for key, value in facts.items()], text=True))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _verify(options: Namespace, command: str) -> None:
    from lata_lightning.store.directories import find_weights, holds_vector
    from lata_lightning.store.formats.table import find_format
    from lata_lightning.vectors.artefact import verify

    path, _ = find_weights(options.path)
    count = verify(path) if holds_vector(path) else find_format(path).verify(path)
    sys.stdout.write(f"{options.path}: all {count} tensors match their recorded hashes\n")


COMMANDS = {
    "extract": Command(
        "Write the difference of two models as a task vector (or, of base and instruct, as the instruction vector).",
        _extract_arguments,
        _extract,
    ),
    "align": Command("Show how far each layer of a task vector is aligned with the instruction vector.", _align_arguments, _align),
    "project": Command(
        "Remove the instruction-vector component from a task vector, layer by layer.",
        _project_arguments,
        _project,
    ),
    "inspect": Command("Say what a path holds, without reading its tensors.", _inspect_arguments, _inspect),
    "verify": Command("Compare the bytes of a task vector or merged model with the hashes written beside them.", _path_arguments, _verify),
}
