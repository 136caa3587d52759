"""``lata quickstart``."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_format, print_json
from lata_lightning.cli.writing import add_writing


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="quickstart-output", help="Directory for vectors, models and tables.")
    add_format(parser)
    add_writing(parser)


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.quickstart.job import run

    results = run(options.output, tables=options.format == "table")
    if options.format == "json":
        print_json(asdict(results))


COMMANDS = {
    "quickstart": Command(
        "Fine-tune, measure, merge and forget on the checkpoints the package ships: the whole job, offline.", _arguments, _run
    ),
}
