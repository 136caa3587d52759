"""Entry point of the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli import evaluate, exports, fit, linearity, merging, quickstart, report, tune, vectors
from lata_lightning.errors import LataError

COMMANDS = {
    **quickstart.COMMANDS,
    **fit.COMMANDS,
    **vectors.COMMANDS,
    **merging.COMMANDS,
    **exports.COMMANDS,
    **linearity.COMMANDS,
    **tune.COMMANDS,
    **evaluate.COMMANDS,
    **report.COMMANDS,
}


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="lata",
        description="Layer-Aware Task Arithmetic: extract task vectors, measure their alignment, merge and forget them.",
        version=version("lata_lightning"),
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.help)
        sub.add_argument("--config", action="config", help="YAML file with the arguments of this command.")
        command.add_arguments(sub)
        subcommands.add_subcommand(name, sub, help=command.help)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 1 after an error that is the input's. Wrong usage exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What a recipe may say depends on the classes it names, so `fit` is parsed where they are known.
    own = arguments[:1] == ["fit"]
    options = Namespace({"command": "fit", "fit": None}) if own else build_parser().parse_args(arguments)  # type: ignore[no-untyped-call]
    try:
        COMMANDS[options.command].run(options[options.command], shlex.join(["lata", *arguments]))
    except LataError as error:
        sys.stderr.write(f"lata: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("lata: interrupted; nothing was left half-written\n")
        return 130
    return 0


def run() -> None:
    """Console script."""
    sys.exit(main())
