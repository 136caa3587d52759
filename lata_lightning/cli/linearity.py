"""``lata linearity`` and ``lata solve``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import ALL_LAYERS, Command, add_all, add_checks, add_format, add_model, note, print_json, progress_bar
from lata_lightning.cli.models import add_template
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import LataError
from lata_lightning.store.output_policy import end_dry_run

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
    add_all(parser)
    parser.add_argument("--distance", type=Literal["l2", "cosine"], default="l2", help="Distance of features.")
    parser.add_argument("--figure", type=str | None, help="Picture of the scores over depth to write: .png, .svg or .pdf.")
    add_writing(parser)


def _solve_arguments(parser: ArgumentParser) -> None:
    add_samples(parser, EACH)
    _add_level(parser, "block")
    add_format(parser)
    add_all(parser)
    parser.add_argument("--output", required=True, help="File of coefficients to write, for lata merge --coefficients.")
    parser.add_argument(
        "--outside",
        type=float,
        default=1.0,
        help="Coefficient of embeddings, norms that are in no solved layer, head and whatever is in no layer.",
    )
    parser.add_argument("--ridge", type=float, default=1e-6, help="Added to the diagonal of what is solved, in units of its mean.")
    add_writing(parser)


def add_samples(parser: ArgumentParser, data: str, *, required: bool = True) -> None:
    """Add the arguments for the start model, the vectors, and the samples that run through it."""
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
    if options.figure is not None:
        end_dry_run(Path(options.figure))
    elif options.dry_run:
        raise LataError("--dry-run shows what would be written, and without --figure nothing is: leave it out")
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
        show(_scores_table(measured, options))


def _solve(options: Namespace, command: str) -> None:
    from lata_lightning.display.tables import show
    from lata_lightning.linearity.solving import solve_coefficients
    from lata_lightning.store.writer import check_free

    check_free(Path(options.output))
    check_data(options)
    vectors, samples = vectors_of(options), samples_of(options, options.data)
    end_dry_run(Path(options.output))
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
        show(_solution_table(solution, options))
    note(
        f"written to {options.output}; merge with: lata merge {options.start_model} {' '.join(options.vectors)} --coefficients {options.output}"
    )


def check_data(options: Namespace) -> None:
    """Raise a LataError unless there is one file for each vector."""
    if len(options.data) != len(options.vectors):
        raise LataError(
            f"give one file of samples for each vector, in the same order: got {len(options.data)} files for {len(options.vectors)} vectors"
        )


def vectors_of(options: Namespace) -> list[TaskVector]:
    """Return the vectors that a command names: saved vectors, or differences of tuned models."""
    from lata_lightning.merging.open_vector import added_to, open_vector

    # Refuses a model that neither the start nor a tuned model holds.
    added_to(options.start_model, options.vectors, options.model)
    settings = {"check_config": options.check_config, "model": options.model}
    return [open_vector(path, options.start_model, **settings)[0] for path in options.vectors]


def samples_of(options: Namespace, data: Sequence[str]) -> list[list[dict[str, Tensor]]]:
    """Return batches of inputs from each file, made by the tokenizer of the start."""
    from lata_lightning.rows.inputs import model_inputs, tokenised
    from lata_lightning.rows.reading import read_rows
    from lata_lightning.rows.schema import read_samples
    from lata_lightning.store.opening import open_source
    from lata_lightning.training.loading import load_tokenizer

    if options.batch_size < 1:
        raise LataError(f"a batch needs at least one row, not {options.batch_size}")
    if (open_source(options.start_model).config or {}).get("is_encoder_decoder"):
        raise LataError(
            f"{options.start_model} has an encoder and a decoder, whose inputs a file of texts does not hold. Use it from Python instead."
        )
    tokenizer = load_tokenizer(options.start_model)
    longest = min(options.max_tokens, tokenizer.model_max_length)
    batches: dict[str, list[dict[str, Tensor]]] = {}
    for path in dict.fromkeys(data):
        samples = read_samples(read_rows(path, options.samples), path)
        rows, cut = tokenised(samples, tokenizer, max_tokens=longest, name=path, template=options.template)
        if cut:
            note(f"{path}: {cut} of {len(rows)} rows were cut to {longest} tokens")
        if len(rows) < options.samples:
            note(f"{path} holds {len(rows)} rows, fewer than the {options.samples} asked for")
        batches[path] = model_inputs(rows, options.batch_size)
    return [batches[path] for path in data]


def _scores_table(measured: Sequence[Linearity], options: Namespace) -> Table:
    from lata_lightning.display.charts import as_text
    from lata_lightning.display.layer_tables import layer_table

    columns = [f"{side} {linearity.vector}" for linearity in measured for side in ("branch", "output")]
    together = list(zip(*(linearity.scores for linearity in measured), strict=True))
    rows = {scores[0].layer: [as_text(value, ".3e") for score in scores for value in (score.branch, score.output)] for scores in together}
    largest = {scores[0].layer: max((score.output for score in scores if score.output is not None), default=None) for scores in together}
    title = f"Non-linearity along each vector (0: linear), {options.distance} distance"
    return layer_table("layer", columns, rows, title, ranked=largest, ranked_as="output", every=options.all, hint=ALL_LAYERS)


def _solution_table(solution: Solution, options: Namespace) -> Table:
    from lata_lightning.display.charts import as_text
    from lata_lightning.display.layer_tables import layer_table

    columns = [*options.vectors, "condition", "residual"]
    rows = {
        layer: [
            *(as_text(solved.coefficients[layer], ".4f") for solved in solution.vectors),
            as_text(fit.condition, ".3g"),
            as_text(fit.residual, ".4f"),
        ]
        for layer, fit in solution.fits.items()
    }
    residuals = {layer: fit.residual for layer, fit in solution.fits.items()}
    title = "Coefficients in closed form"
    table = layer_table(solution.level, columns, rows, title, ranked=residuals, ranked_as="residual", every=options.all, hint=ALL_LAYERS)
    table.caption = "\n".join([*([str(table.caption)] if table.caption else []), f"Everything else has coefficient {solution.outside:g}."])
    return table


COMMANDS = {
    "linearity": Command(
        "Show how far each block of a model, its attention and its MLP are from linear along task vectors.",
        _linearity_arguments,
        _linearity,
    ),
    "solve": Command("Find the coefficients of a merge in closed form from a few samples of each task.", _solve_arguments, _solve),
}
