"""``lata recipes``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_format, note, print_json
from lata_lightning.cli.shipped import RECIPES, recipes, summary
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import LataError, OutputError
from lata_lightning.store.output_policy import end_dry_run


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--copy", metavar="DIR", type=str | None, help="Directory to copy the recipes and their data to, to change them.")
    add_format(parser)
    add_writing(parser, overwrite=False)


def _run(options: Namespace, command: str) -> None:
    if options.copy is not None:
        _copy(Path(options.copy))
        return
    if options.dry_run:
        raise LataError("--dry-run shows what would be written, and without --copy nothing is: leave it out")
    found = {name: summary(path) for name, path in recipes().items()}
    if options.format == "json":
        print_json(found)
        return
    from lata_lightning.display.tables import plain_table, show

    show(plain_table(["recipe", "what it does"], list(found.items()), text=True))
    note("run one with lata fit --config NAME (merge_pair: lata merge, unlearn: lata forget)")


def _copy(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise OutputError(f"{target} exists and is not empty. Choose another directory, or remove it first.")
    end_dry_run(target)
    shutil.copytree(RECIPES, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    sys.stdout.write(f"{target}\n")


COMMANDS = {"recipes": Command("List the recipes that the package ships, or copy them to change them.", _arguments, _run)}
