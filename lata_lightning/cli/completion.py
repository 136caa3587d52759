"""``lata completion``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command


def commands(build_parser: Callable[[], ArgumentParser]) -> dict[str, Command]:
    """Return the command by its name.

    Args:
        build_parser: Returns the parser of all commands, this one included, which the script completes.
    """

    def run(options: Namespace, command: str) -> None:
        import shtab

        sys.stdout.write(shtab.complete(build_parser(), shell=options.shell) + "\n")

    text = "Print a script that completes commands, options and choices in a shell; source it there."
    return {"completion": Command(text, _arguments, run)}


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", type=Literal["bash", "zsh", "fish"], help="bash, zsh or fish.")
