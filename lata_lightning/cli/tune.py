"""``lata tune``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_start, note
from lata_lightning.cli.models import add_loading, load
from lata_lightning.errors import LataError

if TYPE_CHECKING:
    from lata_lightning.evaluation.tuning import Tuning
    from lata_lightning.vectors.task_vector import TaskVector

# Spelled out because the module that knows it imports torch; a test holds both together.
DEFAULT_GRID = [0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0]


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("onto", metavar="ONTO", help="Model to add to, or to take off: directory or hub id.")
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors, or tuned models, whose vector is tuned − ONTO.")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        required=True,
        help="JSONL files of validation data; with --forget, of what is to be forgotten.",
    )
    parser.add_argument(
        "--forget", type=bool, default=False, help="Take the vectors off, and choose what leaves least of the validation score."
    )
    parser.add_argument("--control", metavar="FILE", nargs="+", default=[], help="With --forget: JSONL files of what must not suffer.")
    parser.add_argument("--keep", type=float, default=0.95, help="With --forget: share of the control performance to keep.")
    parser.add_argument("--grid", type=float, nargs="+", default=DEFAULT_GRID, help="Scales to try; 0, the model itself, always is.")
    parser.add_argument("--metric", type=Literal["exact_match", "perplexity"], default="exact_match", help="What to choose by.")
    parser.add_argument("--context-length", type=int, default=128, help="For the perplexity of text: tokens of a window.")
    parser.add_argument("--instruction", type=str | None, help="Instruction vector (instruct − base) to measure the alignment with.")
    parser.add_argument(
        "--weighting",
        type=Literal["linear", "log", "threshold", "none"],
        nargs="+",
        default=[],
        help="Rules to try, 'none' for plain task arithmetic. By default 'none', and with an alignment 'linear' too, or 'threshold' with --forget.",
    )
    parser.add_argument("--level", type=Literal["block", "submodule", "tensor"], default="block", help="Unit of the coefficients.")
    parser.add_argument(
        "--threshold", type=float, default=0.95, help="For the rule 'threshold': layers aligned this far get coefficient 0."
    )
    parser.add_argument("--outside", type=float, default=0.0, help="Coefficient of whatever is in no layer, under a rule.")
    add_start(parser)
    parser.add_argument("--figure", type=bool, default=True, help="Draw the curves as PNG and SVG; needs matplotlib.")
    parser.add_argument("--output", required=True, help="Directory to write tune.json and the figures to.")
    add_loading(parser)


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.evaluation.questions import names_of, prepare
    from lata_lightning.evaluation.tuning import tune, under_rules
    from lata_lightning.store.writer import atomic_directory, check_free, write_json
    from lata_lightning.vectors.task_vector import TaskVector

    if options.forget != bool(options.control):
        raise LataError("--forget needs --control FILE: data whose score must not suffer, and --control is for --forget only")
    _check_figure(options)
    check_free(Path(options.output))
    data, control = names_of(options.data), names_of(options.control)
    _note_few({**data, **{f"{name} (control)": path for name, path in control.items()}})
    instruction = None if options.instruction is None else TaskVector.open(options.instruction)
    vectors = [_vector(options, path) for path in options.vectors]
    weighted = under_rules(
        vectors,
        _rules(options, vectors),
        instruction,
        level=options.level,
        threshold=options.threshold,
        outside=options.outside,
        check_base=options.check_base,
    )
    if options.check_base:
        from lata_lightning.vectors.aligning import check_same_start

        check_same_start(weighted[next(iter(weighted))])
    model, tokenizer = load(options.onto, options.dtype, options.device)
    scorers, controls = (
        {name: prepare(options.metric, tokenizer, path, options.context_length) for name, path in side.items()} for side in (data, control)
    )
    with atomic_directory(Path(options.output)) as directory:
        with _points() as progress:
            found = tune(
                model, weighted, scorers, metric=options.metric, grid=options.grid, control=controls, kept=options.keep, progress=progress
            )
        write_json(directory / "tune.json", {**found.to_json(), "command": command})
        if options.figure:
            from lata_lightning.display.pictures import save

            save(found.chart(), directory)
    _show(options, found)


def _check_figure(options: Namespace) -> None:
    from importlib.util import find_spec

    if options.figure and find_spec("matplotlib") is None:
        raise LataError("the figure needs matplotlib: pip install 'lata_lightning[report]', or go without one (--figure false)")


def _note_few(files: dict[str, str]) -> None:
    from lata_lightning.evaluation.questions import distinct
    from lata_lightning.evaluation.tuning import FEW_ROWS

    for name, path in files.items():
        rows = distinct(path)
        if rows < FEW_ROWS:
            note(f"{name} has {rows} distinct rows; a scale chosen on fewer than {FEW_ROWS} may not hold on other data")


def _vector(options: Namespace, path: str) -> TaskVector:
    from dataclasses import replace

    from lata_lightning.store.directories import holds_vector
    from lata_lightning.vectors.task_vector import TaskVector

    vector = TaskVector.open(path) if holds_vector(path) else TaskVector.between(options.onto, path, start_kind=options.start or "instruct")
    return vector if options.start is None else TaskVector(vector.tensors, replace(vector.manifest, start=options.start))


def _rules(options: Namespace, vectors: list[TaskVector]) -> list[Literal["linear", "log", "threshold", "none"]]:
    if options.weighting:
        return list(dict.fromkeys(options.weighting))
    if options.instruction is None and not all(vector.manifest.alignment is not None for vector in vectors):
        return ["none"]
    return ["none", "threshold" if options.forget else "linear"]


@contextmanager
def _points() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that counts points; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("scales", total=None)
        yield lambda done, count: progress.update(task, completed=done, total=count)


def _show(options: Namespace, found: Tuning) -> None:
    from lata_lightning.display.tables import plain_table, show
    from lata_lightning.evaluation.tuning import mean_score

    best = found.best
    sides = ["score"] if found.kept is None else ["to forget", "to keep"]
    rows = [
        (
            f"{point.weighting} ← chosen" if (point.weighting, point.scale) == (best.weighting, best.scale) else point.weighting,
            f"{point.scale:g}",
            *(
                "–" if (value := mean_score(found.metric, side)) is None else f"{value:.4g}"
                for side in (point.scores, point.control)[: len(sides)]
            ),
        )
        for point in found.points
    ]
    show(plain_table(["weighting", "scale", *sides], rows, f"{found.metric}, mean over files"))
    if best.scale == 0:
        sys.stdout.write("No scale above 0 is better than the model as it is.\n")
    else:
        sys.stdout.write(f"{_next_command(options, best.weighting, best.scale)}\n")


def _next_command(options: Namespace, weighting: str, scale: float) -> str:
    """The command that writes the chosen model; what takes off several vectors is a merge at a negative scale."""
    one = options.forget and len(options.vectors) == 1
    words = ["lata", "forget" if one else "merge", options.onto, *options.vectors, "--weighting", weighting]
    words.append(f"--scale={-scale if options.forget and not one else scale:g}")
    if options.instruction is not None:
        words += ["--instruction", options.instruction]
    for name, default in (("level", "block"), ("threshold", 0.95), ("outside", 0.0), ("start", None), ("check_base", True)):
        if options[name] != default:
            words += [f"--{name.replace('_', '-')}", str(options[name]).lower()]
    return shlex.join([*words, "--output", "MODEL"])


COMMANDS = {
    "tune": Command("Choose rule and scale on validation data, without writing a model for every point.", _arguments, _run),
}
