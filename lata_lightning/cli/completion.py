"""``lata completion``."""

from __future__ import annotations

import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", type=Literal["bash", "zsh", "fish"], help="bash, zsh or fish.")


def _run(options: Namespace, command: str) -> None:
    import shtab

    from lata_lightning.cli.main import build_parser

    sys.stdout.write(shtab.complete(build_parser(), shell=options.shell) + "\n")


COMMANDS = {
    "completion": Command("Print a script that completes commands, options and choices in a shell; source it there.", _arguments, _run),
}
