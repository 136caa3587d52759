"""``lata quickstart``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="quickstart-output", help="Directory for vectors, models and tables; it must not exist yet.")


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.quickstart.job import run

    run(options.output)


COMMANDS = {
    "quickstart": Command(
        "Fine-tune, measure, merge and forget on the checkpoints the package ships: the whole job, offline.", _arguments, _run
    ),
}
