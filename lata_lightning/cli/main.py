"""Entry point of the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import wrap

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli import (
    completion,
    evaluate,
    exports,
    fit,
    linearity,
    merging,
    quickstart,
    recipes,
    regression,
    report,
    tune,
    vectors,
)
from lata_lightning.cli.common import Command
from lata_lightning.cli.examples import EXAMPLES
from lata_lightning.cli.hub import check_hub, upload
from lata_lightning.cli.parsing import CommandParser
from lata_lightning.cli.shipped import located
from lata_lightning.cli.writing import policy_of, show_plan
from lata_lightning.errors import LataError, nearest
from lata_lightning.store.output_policy import DryRun, output_policy

COMMANDS = {
    **quickstart.COMMANDS,
    **fit.COMMANDS,
    **vectors.COMMANDS,
    **merging.COMMANDS,
    **exports.COMMANDS,
    **linearity.COMMANDS,
    **regression.COMMANDS,
    **tune.COMMANDS,
    **evaluate.COMMANDS,
    **report.COMMANDS,
    **recipes.COMMANDS,
    **completion.commands(lambda: build_parser()),
}
_DESCRIPTION = "Layer-Aware Task Arithmetic: extract task vectors, measure their alignment, merge and forget them."


def parser_of(name: str) -> CommandParser:
    """Return the parser of one command."""
    command: Command = COMMANDS[name]
    parser = CommandParser(name, command.help, EXAMPLES[name])
    parser.add_argument(
        "--config",
        action="config",
        metavar="RECIPE",
        help="YAML file with the arguments, or the name of a recipe (lata recipes).",
    )
    command.add_arguments(parser)
    return parser


def build_parser() -> ArgumentParser:
    """Return one parser for all commands, from which shell completion is made."""
    parser = ArgumentParser(prog="lata", description=_DESCRIPTION, version=version("lata_lightning"))
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, parser_of(name), help=command.help)
    return parser


def overview() -> str:
    """Return a list of all commands with a sentence of help each."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: lata COMMAND [arguments]", "", *wrap(_DESCRIPTION, 100), "", "commands:"]
    for name, command in COMMANDS.items():
        first, *rest = wrap(command.help, 100 - width)
        lines += [f"  {name:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in rest)]
    return "\n".join(
        [*lines, "", "lata COMMAND --help shows the arguments of a command, and two examples.", "lata --version shows the version.", ""]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Returns:
        0, 1 after a ``LataError``, or 130 after an interruption by the keyboard. Wrong usage raises ``SystemExit`` with status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"lata {version('lata_lightning')}\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        sys.stderr.write(f"lata: error: there is no {what} {name}{nearest(name, COMMANDS)} lata --help lists all commands.\n")
        raise SystemExit(2)
    command = COMMANDS[name]
    try:
        # What a recipe may say depends on the classes it names, so `fit` is parsed where they are known.
        if command.parses_itself:
            options = Namespace({})  # type: ignore[no-untyped-call]
        else:
            parser = parser_of(name)
            options = located(parser.parse_args(parser.arranged(rest)))
        repository = options.get("push_to_hub")
        if repository is not None:
            check_hub(repository)
        with output_policy(policy_of(options)):
            command.run(options, shlex.join(["lata", *arguments]))
        if repository is not None:
            upload(options.output, repository)
    except DryRun as stopped:
        show_plan(options, stopped)
    except LataError as error:
        sys.stderr.write(f"lata: error: {error}\n")
        return 1
    except KeyboardInterrupt as interrupted:
        advice = f"; {interrupted}" if str(interrupted) else ""
        sys.stderr.write(f"lata: interrupted; nothing was left half-written{advice}\n")
        return 130
    return 0


def run() -> None:
    """Run the command line and exit with its status; the console script."""
    sys.exit(main())
