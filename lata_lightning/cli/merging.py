"""``lata merge`` and ``lata forget``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import (
    Command,
    add_leave_out,
    add_model,
    add_weighting,
    add_workers,
    note,
    progress_bar,
    weighed,
)
from lata_lightning.cli.writing import add_writing, applying
from lata_lightning.errors import LataError
from lata_lightning.linearity.methods import Method
from lata_lightning.store.dtypes import FloatName

if TYPE_CHECKING:
    from lata_lightning.merging.merge import Term
    from lata_lightning.store.opening import Weights
    from lata_lightning.vectors.task_vector import TaskVector
    from lata_lightning.weighting import Weighting


def _merge_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("onto", metavar="ONTO", help="Model to add to: directory, .ckpt or hub id.")
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors, or tuned models, whose vector is tuned − ONTO.")
    _common_arguments(parser, "linear")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="One scale for all vectors, or one for each.")
    parser.add_argument(
        "--method",
        type=Method | None,
        help="How several vectors become one: 'sum' adds them, which is task arithmetic and the default; 'regression' solves every matrix from the "
        "vectors alone, at scale 1; 'tsv' and 'iso' go by singular vectors (TSV-M, Iso-C).",
    )
    parser.add_argument("--device", default="cpu", help="Where --method solves matrices, such as cuda.")


def _forget_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="Model that has the unwanted skill: directory, .ckpt or hub id.")
    parser.add_argument(
        "vector", metavar="VECTOR", help="Saved vector of the unwanted skill, or a tuned model, whose vector is tuned − TARGET."
    )
    _common_arguments(parser, "threshold")
    parser.add_argument("--scale", type=float, default=1.0, help="How much of the vector to take off.")


def _common_arguments(parser: ArgumentParser, rule: str) -> None:
    add_weighting(parser, rule)
    parser.add_argument(
        "--coefficients",
        type=str | None,
        help="File of lata solve with the coefficients of these vectors, in this order; it brings level and outside.",
    )
    parser.add_argument("--output", required=True, help="Directory to write the model to.")
    parser.add_argument("--dtype", type=FloatName | None, help="Precision of the output; by default that of the model.")
    parser.add_argument(
        "--vocabulary",
        type=Literal["union", "onto"] | None,
        help="Where vocabularies differ: 'onto' keeps the tokens of the model and drops others, 'union' adds those that only a tuned model has, with "
        "its rows and tokenizer. By default such models are refused.",
    )
    add_leave_out(parser)
    add_model(parser)
    add_workers(parser)
    add_writing(parser, hub=True)


def _merge(options: Namespace, command: str) -> None:
    from lata_lightning.merging.merge import merge
    from lata_lightning.merging.open_vector import added_to

    scales = options.scale * len(options.vectors) if len(options.scale) == 1 else options.scale
    if len(scales) != len(options.vectors):
        raise LataError(f"give one scale for all vectors or one for each: got {len(scales)} scales for {len(options.vectors)} vectors")
    method: Method = options.method or "sum"
    terms = _terms(options, options.onto, options.vectors, scales, "linear") if method == "sum" else _whole_terms(options, scales)
    with applying(terms), progress_bar("merge") as progress:
        merge(
            added_to(options.onto, options.vectors, options.model),
            terms,
            options.output,
            method=method,
            device=options.device,
            command=command,
            progress=progress,
            **_settings(options),
        )
    if options.method is None and len(terms) > 1:
        note(
            "the vectors were added up (task arithmetic); --method regression would make them into one without samples and without a scale to choose"
        )
    sys.stdout.write(f"{options.output}\n")


def _forget(options: Namespace, command: str) -> None:
    from lata_lightning.merging.merge import forget
    from lata_lightning.merging.open_vector import added_to

    (term,) = _terms(options, options.target, [options.vector], [options.scale], "threshold")
    with applying([term]), progress_bar("forget") as progress:
        forget(
            added_to(options.target, [options.vector], options.model),
            term,
            options.output,
            command=command,
            progress=progress,
            **_settings(options),
        )
    sys.stdout.write(f"{options.output}\n")


def _settings(options: Namespace) -> dict[str, Any]:
    given = {key: options[key] for key in ("dtype", "check_base", "vocabulary", "workers", "leave_out")}
    return {**given, "note": note}


def _whole_terms(options: Namespace, scales: Sequence[float]) -> list[Term]:
    """Return the vectors without coefficients, for methods that make one vector of all."""
    from lata_lightning.merging.merge import Term

    weighted = [name for name in ("instruction", "coefficients", "level", "threshold", "outside") if options[name] is not None]
    weighted += ["weighting"] if options.weighting not in (None, "none") else []
    if weighted:
        raise LataError(
            f"--method {options.method} takes vectors whole, so --{weighted[0]} cannot be given; --method sum weights them layer by layer"
        )
    given = [_vector(options, options.onto, path) for path in options.vectors]
    return [Term(vector.unweighted(), scale, tuned) for (vector, tuned), scale in zip(given, scales, strict=True)]


def _terms(options: Namespace, onto: str, paths: Sequence[str], scales: Sequence[float], rule: Weighting) -> list[Term]:
    if options.coefficients is None:
        return [_term(options, onto, path, scale, rule) for path, scale in zip(paths, scales, strict=True)]
    from lata_lightning.linearity.solution import Solution
    from lata_lightning.merging.merge import Term

    excess = [name for name in ("instruction", "weighting", "level", "threshold", "outside") if options[name] is not None]
    if excess:
        raise LataError(
            "coefficients come from a file or from a rule: give --coefficients, or --instruction and --weighting, not both; given beside the file is "
            f"--{excess[0]}"
        )
    solution = Solution.open(options.coefficients)
    given = [_vector(options, onto, path) for path in paths]
    solved = solution.apply([vector for vector, _ in given], check_base=options.check_base)
    return [Term(vector, scale, tuned) for vector, scale, (_, tuned) in zip(solved, scales, given, strict=True)]


def _term(options: Namespace, onto: str, path: str, scale: float, rule: Weighting) -> Term:
    from lata_lightning.merging.merge import Term

    vector, tuned = _vector(options, onto, path)
    return Term(weighed(options, vector, _instruction(options, onto, vector), rule), scale, tuned)


def _vector(options: Namespace, onto: str, path: str) -> tuple[TaskVector, Weights | None]:
    from lata_lightning.merging.open_vector import open_vector

    settings = {key: options[key] for key in ("start", "vocabulary", "check_config", "leave_out", "model")}
    return open_vector(path, onto, **settings)


def _instruction(options: Namespace, onto: str, vector: TaskVector) -> TaskVector | None:
    """Return the instruction vector, with the rows of the vector if vocabularies may differ; None if none is given."""
    from lata_lightning.merging.vocabularies import resized
    from lata_lightning.store.opening import open_source
    from lata_lightning.vectors.task_vector import TaskVector

    if options.instruction is None:
        return None
    instruction = TaskVector.open(options.instruction, check_config=options.check_config)
    return instruction if options.vocabulary is None else resized(instruction, vector, open_source(onto).config)


COMMANDS = {
    "merge": Command(
        "Add vectors to a model, weighted layer by layer, and write the result as a complete model directory.", _merge_arguments, _merge
    ),
    "forget": Command(
        "Take the vector of an unwanted skill off a model and write the result as a complete model directory.", _forget_arguments, _forget
    ),
}
