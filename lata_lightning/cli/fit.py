"""``lata fit``."""

from __future__ import annotations

import shlex

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command


def _arguments(parser: ArgumentParser) -> None:
    """None: they are those of the Trainer and of the classes a recipe names, which Lightning's own parser reads."""


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.training.command import FitCLI

    FitCLI(shlex.split(command)[1:])


COMMANDS = {"fit": Command("Fine-tune a model as a recipe says, and keep its task vector.", _arguments, _run)}
