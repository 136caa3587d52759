"""``lata linearity`` and ``lata solve``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_checks, add_format, add_model, note, print_json, progress_bar
from lata_lightning.cli.models import add_template, load_tokenizer
from lata_lightning.errors import LataError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from lata_lightning.linearity.scores import Linearity
    from lata_lightning.linearity.solution import Solution
    from lata_lightning.vectors.task_vector import TaskVector


EACH = "One file of samples for each vector, of its own task, in the same order"


def _linearity_arguments(parser: ArgumentParser) -> None:
    add_samples(parser, "One file of samples for all vectors, or one for each")
    _add_level(parser, "submodule")
    add_format(parser)
    parser.add_argument("--distance", type=Literal["l2", "cosine"], default="l2", help="Distance of features.")
    parser.add_argument("--figure", type=str | None, help="Picture of the scores over depth to write: .png, .svg or .pdf.")


def _solve_arguments(parser: ArgumentParser) -> None:
    add_samples(parser, EACH)
    _add_level(parser, "block")
    add_format(parser)
    parser.add_argument("--output", required=True, help="File of coefficients to write, for lata merge --coefficients.")
    parser.add_argument(
        "--outside",
        type=float,
        default=1.0,
        help="Coefficient of embeddings, norms that are in no solved layer, head and whatever is in no layer.",
    )
    parser.add_argument("--ridge", type=float, default=1e-6, help="Added to the diagonal of what is solved, in units of its mean.")


def add_samples(parser: ArgumentParser, data: str, *, required: bool = True) -> None:
    """The start model, the vectors, and the samples that are run through it."""
    add_model(parser)
    parser.add_argument("start_model", metavar="START", help="Model the fine-tunes started from: directory or hub id, with tokenizer.")
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors, or tuned models, whose vector is tuned − START.")
    parser.add_argument(
        "--data",
        nargs="+",
        required=required,
        help=f"{data}: rows with prompt and answer (or completion), question and answer, messages, or text; or the name of a data set.",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=30,
        help="Rows to take from the top of each file. Together they should have twice as many tokens as the widest layer takes in numbers.",
    )
    add_template(parser)
    parser.add_argument("--max-tokens", type=int, default=512, help="Longer rows are cut, and so are rows longer than the model takes.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows that are run at once; makes no difference to the result.")
    add_checks(parser)


def _add_level(parser: ArgumentParser, level: str) -> None:
    parser.add_argument(
        "--level", type=Literal["block", "submodule"], default=level, help="Blocks, or attention and MLP of each separately."
    )


def _linearity(options: Namespace, command: str) -> None:
    from lata_lightning.display.linearity import save_figure
    from lata_lightning.display.tables import show
    from lata_lightning.linearity.scores import cosine_distance, l2_distance, measure_linearity
    from lata_lightning.store.writer import check_free

    if options.figure is not None:
        check_free(Path(options.figure))
    data = options.data * len(options.vectors) if len(options.data) == 1 else options.data
    if len(data) != len(options.vectors):
        raise LataError(
            f"give one file of samples for all vectors or one for each: got {len(data)} files for {len(options.vectors)} vectors"
        )
    vectors, samples = vectors_of(options), samples_of(options, data)
    distance = {"l2": l2_distance, "cosine": cosine_distance}[options.distance]
    with progress_bar("linearity") as progress:
        measured = measure_linearity(
            options.start_model,
            vectors,
            samples,
            level=options.level,
            distance=distance,
            check_base=options.check_base,
            progress=progress,
            note=note,
        )
    # Under the names that were typed, which are shorter than those of differences.
    measured = [replace(linearity, vector=path) for linearity, path in zip(measured, options.vectors, strict=True)]
    if options.figure is not None:
        save_figure(measured, options.figure)
        note(f"figure written to {options.figure}")
    if options.format == "json":
        print_json([linearity.to_json() for linearity in measured])
    else:
        show(_scores_table(measured, options.distance))


def _solve(options: Namespace, command: str) -> None:
    from lata_lightning.display.tables import show
    from lata_lightning.linearity.solving import solve_coefficients
    from lata_lightning.store.writer import check_free

    check_free(Path(options.output))
    check_data(options)
    vectors, samples = vectors_of(options), samples_of(options, options.data)
    with progress_bar("solve") as progress:
        solution = solve_coefficients(
            options.start_model,
            vectors,
            samples,
            level=options.level,
            outside=options.outside,
            ridge=options.ridge,
            check_base=options.check_base,
            progress=progress,
            note=note,
        )
    solution.save(options.output)
    if options.format == "json":
        print_json(solution.to_json())
    else:
        show(_solution_table(solution, options.vectors))
    note(
        f"written to {options.output}; merge with: lata merge {options.start_model} {' '.join(options.vectors)} --coefficients {options.output}"
    )


def check_data(options: Namespace) -> None:
    """Refuse another number of files than of vectors."""
    if len(options.data) != len(options.vectors):
        raise LataError(
            f"give one file of samples for each vector, in the same order: got {len(options.data)} files for {len(options.vectors)} vectors"
        )


def vectors_of(options: Namespace) -> list[TaskVector]:
    """The vectors that a command names, saved ones or of tuned models."""
    from lata_lightning.merging.open_vector import added_to, open_vector

    # Refuses a model that neither the start nor a tuned model holds.
    added_to(options.start_model, options.vectors, options.model)
    settings = {"check_config": options.check_config, "model": options.model}
    return [open_vector(path, options.start_model, **settings)[0] for path in options.vectors]


def samples_of(options: Namespace, data: Sequence[str]) -> list[list[dict[str, Tensor]]]:
    """Batches of inputs from each file, by the tokenizer of the start."""
    from lata_lightning.rows.inputs import model_inputs, tokenised
    from lata_lightning.rows.reading import read_rows
    from lata_lightning.rows.schema import read_samples
    from lata_lightning.store.opening import open_source

    if options.batch_size < 1:
        raise LataError(f"a batch needs at least one row, not {options.batch_size}")
    if (open_source(options.start_model).config or {}).get("is_encoder_decoder"):
        raise LataError(
            f"{options.start_model} has an encoder and a decoder, whose inputs a file of texts does not hold. Use it from Python instead."
        )
    tokenizer = load_tokenizer(options.start_model)
    longest = min(options.max_tokens, tokenizer.model_max_length)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for path in dict.fromkeys(data):
        samples = read_samples(read_rows(path, options.samples), path)
        rows, cut = tokenised(samples, tokenizer, max_tokens=longest, name=path, template=options.template)
        if cut:
            note(f"{path}: {cut} of {len(rows)} rows were cut to {longest} tokens")
        if len(rows) < options.samples:
            note(f"{path} holds {len(rows)} rows, fewer than the {options.samples} asked for")
        found[path] = model_inputs(rows, options.batch_size)
    return [found[path] for path in data]


def _scores_table(measured: Sequence[Linearity], distance: str) -> Table:
    from lata_lightning.display.tables import plain_table

    columns = ["layer", *(f"{side} {linearity.vector}" for linearity in measured for side in ("branch", "output"))]
    rows = [
        [scores[0].layer, *(_figure(value, ".3e") for score in scores for value in (score.branch, score.output))]
        for scores in zip(*(linearity.scores for linearity in measured), strict=True)
    ]
    return plain_table(columns, rows, f"Non-linearity along each vector (0: linear), {distance} distance", sections=[1])


def _solution_table(solution: Solution, names: Sequence[str]) -> Table:
    from lata_lightning.display.tables import plain_table

    columns = [solution.level, *names, "condition", "residual"]
    rows = [
        [
            layer,
            *(_figure(solved.coefficients[layer], ".4f") for solved in solution.vectors),
            _figure(fit.condition, ".3g"),
            _figure(fit.residual, ".4f"),
        ]
        for layer, fit in solution.fits.items()
    ]
    table = plain_table(columns, rows, "Coefficients in closed form")
    table.caption = f"Everything else has coefficient {solution.outside:g}."
    return table


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


COMMANDS = {
    "linearity": Command(
        "Show how far each block of a model, its attention and its MLP are from linear along task vectors.",
        _linearity_arguments,
        _linearity,
    ),
    "solve": Command("Find the coefficients of a merge in closed form from a few samples of each task.", _solve_arguments, _solve),
}
