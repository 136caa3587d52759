"""Shared parts of the commands: their form, common arguments, and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lata_lightning.errors import LataError
from lata_lightning.layers import Level
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting

if TYPE_CHECKING:
    from lata_lightning.vectors.task_vector import TaskVector

Format = Literal["table", "json"]
_SECONDS_BETWEEN = 0.1
_SECONDS_BETWEEN_LINES = 5.0


class Command(NamedTuple):
    """One command.

    Attributes:
        help: A sentence.
        add_arguments: Adds its arguments to a parser.
        run: Runs the command, with the arguments and the command line as typed.
        parses_itself: Whether ``run`` parses the command line too; then its arguments are empty.
    """

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, str], None]
    parses_itself: bool = False


def add_format(parser: ArgumentParser) -> None:
    """Add ``--format table|json``."""
    parser.add_argument("--format", type=Format, default="table", help="How to print the result.")


ALL_LAYERS = "--all shows them."


def add_all(parser: ArgumentParser) -> None:
    """Add ``--all``."""
    parser.add_argument(
        "--all", type=bool, default=False, help="Show every layer, also of a model with many; by default the first, last and extreme ones."
    )


def add_weighting(parser: ArgumentParser, default: str) -> None:
    """Add the arguments that decide with which coefficients a vector is applied.

    Args:
        parser: Parser of the command.
        default: The rule with ``--instruction`` if none is given.
    """
    parser.add_argument("--instruction", type=str | None, help="Instruction vector (instruct − base) to measure the alignment with.")
    parser.add_argument(
        "--weighting",
        type=Literal[Weighting, "stored"] | None,
        help="Rule for the coefficients; 'none' for plain task arithmetic, 'stored' for those that the vector stores. If no rule is asked for, "
        f"'{default}' with --instruction; without, what the vector stores, which is refused where its alignments are too flat to rank by.",
    )
    parser.add_argument("--level", type=Level | None, help="Unit of the coefficients; 'block' if not given.")
    parser.add_argument(
        "--threshold",
        type=float | None,
        help=f"For the rule 'threshold': layers aligned this far get coefficient 0; {DEFAULT_THRESHOLD} if not given.",
    )
    parser.add_argument(
        "--outside",
        type=float | None,
        help="Coefficient of embeddings, final norm, head and whatever is in no layer, under a rule; 0 if not given.",
    )
    add_start(parser)


def weighed(options: Namespace, vector: TaskVector, instruction: TaskVector | None, default: Weighting) -> TaskVector:
    """Return a vector relative to instruct, with the coefficients that the arguments of ``add_weighting`` ask for.

    Raises:
        LataError: An argument has no effect on what is applied; or as ``lata_lightning.merging.weigh.weigh``.
    """
    from lata_lightning.merging.weigh import from_instruct, weigh

    rule = options.weighting or (default if instruction is not None else "stored")
    given = [name for name in ("level", "threshold", "outside") if options[name] is not None]
    if given and rule in ("none", "stored"):
        plain = rule == "none" or vector.manifest.coefficients is None
        what = "every tensor has coefficient 1" if plain else "the stored coefficients are applied as they are"
        raise LataError(f"--{given[0]} has no effect where {what}: leave it out, or ask for a rule it belongs to (--weighting linear)")
    settings = {name: options[name] for name in given}
    weighted = weigh(vector, options.weighting, instruction, default=default, check_base=options.check_base, **settings)
    return from_instruct(weighted, instruction)


def add_start(parser: ArgumentParser) -> None:
    """Add ``--start`` and the switches for provenance checks."""
    parser.add_argument(
        "--start",
        type=Literal["instruct", "base"] | None,
        help="What the fine-tune started from; by default what the vector's manifest says.",
    )
    add_checks(parser)


def add_checks(parser: ArgumentParser) -> None:
    """Add the switches for provenance checks."""
    parser.add_argument("--check-base", type=bool, default=True, help="Refuse vectors that are known to belong to different weights.")
    add_check_config(parser)


def add_check_config(parser: ArgumentParser) -> None:
    """Add ``--check-config``."""
    parser.add_argument(
        "--check-config",
        type=bool,
        default=True,
        help="Refuse models whose configs describe different functions of the same weights, such as another rope_theta.",
    )


def add_leave_out(parser: ArgumentParser) -> None:
    """Add ``--leave-out``, which may be given several times."""
    parser.add_argument(
        "--leave-out",
        metavar="PATTERN",
        type=str,
        action="append",
        default=[],
        help="Regular expression, searched in tensor names: what matches is left out, such as '^classifier\\.'. May be given several times.",
    )


def add_model(parser: ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        type=str | None,
        help="Which model is meant where a checkpoint holds several (actor and reference, a running average): the name of its module, or the key of "
        "its state dict.",
    )


def add_workers(parser: ArgumentParser) -> None:
    """Add ``--workers``."""
    parser.add_argument(
        "--workers",
        type=PositiveInt | None,
        help="Threads that work on a tensor each; by default one for each processor, up to four. The result is the same.",
    )


def print_json(data: Any) -> None:
    """Print JSON on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def note(text: str) -> None:
    """Print one line on standard error."""
    sys.stderr.write(f"lata: {text}\n")


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error with bytes per second and time left, if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        shown = 0.0

        def show(done: int, size: int) -> None:
            # Whoever calls may do so for every small piece, and drawing costs more than a piece.
            nonlocal shown
            now = monotonic()
            if now - shown >= _SECONDS_BETWEEN or done >= size:
                shown = now
                progress.update(task, completed=done, total=size)

        yield show


@contextmanager
def point_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show points done and time left on standard error: a bar on a terminal, otherwise a line every few seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines_of_progress(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, count: progress.update(task, completed=done, total=count)


def _lines_of_progress(title: str) -> Callable[[int, int], None]:
    begun = shown = monotonic()

    def show(done: int, count: int) -> None:
        nonlocal shown
        now = monotonic()
        if now - shown >= _SECONDS_BETWEEN_LINES and done:
            shown = now
            note(f"{title}: {done} of at most {count} points, about {(now - begun) / done * (count - done):.0f} s left")

    return show
