"""Runs the evidence benchmark: one seed, all seeds, or the page of what has been found.

python -m study seed 0 [--part merging] [--settings skills-instruct-compute+reverse+encode ...] [--rows first]
python -m study all --seeds 0 1 2 3 4
python -m study page
python -m study real smollm2_135m [--tiny] [--plan]
python -m study real llama3_8b [--tiny] [--plan]

What is there already is not done again: trained models lie in --work, results in --results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lata_lightning.errors import LataError, first_three
from study.merging import write_json
from study.page import FIRST_SCREEN, FOLDER
from study.real import command as real
from study.settings import Setting, all_settings, settings
from study.statistics import FIRST_DEVELOPMENT_SEED
from study.tasks import data_folder

if TYPE_CHECKING:
    from study.chain import Chain

PARTS = ("merging", "removal", "forgetting", "continual", "heterogeneity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        arguments: Without the program's name; the process's own unless given.

    Raises:
        LataError: There is no data, a setting is unknown, or a part cannot be run.
    """
    options = _parser().parse_args(arguments)
    if options.command == "real":
        return real.run(options)
    # One thread: on small matrices more threads cost more than they bring, and results would depend on their number.
    torch.set_num_threads(1)
    if options.command == "page":
        from study.page import write

        write(options.results)
        return 0
    if options.data is not None:
        os.environ["LATA_DATA"] = str(options.data)
    for seed in [options.seed] if options.command == "seed" else options.seeds:
        for part in PARTS if options.part == "all" else (options.part,):
            _run(part, seed, options)
    return 0


def _run(part: str, seed: int, options: argparse.Namespace) -> None:
    from study.chain import Chain

    chain = Chain(options.work, seed, data=data_folder())
    if part == "merging":
        for setting in _settings(options):
            _merge(chain, setting, options)
        return
    path = options.results / f"{part}-seed-{seed}.json"
    if path.exists():
        return
    if part == "variants" and seed < FIRST_DEVELOPMENT_SEED:
        raise LataError(f"variants are compared on development seeds, from {FIRST_DEVELOPMENT_SEED} on; got {seed}")
    if part == "heterogeneity":
        from study import heterogeneity

        _tell(path, heterogeneity.run(options.work, seed, data=data_folder()))
    else:
        _tell(path, import_module(f"study.{part}").run(chain))


def _merge(chain: Chain, setting: Setting, options: argparse.Namespace) -> None:
    """Run the rows of a setting that its result lacks, and write them together with those that are there."""
    from study import merging
    from study.rules import EVERY_SEED, methods_for

    results = options.results / FIRST_SCREEN if options.rows == ["first"] else options.results
    path = results / f"merging-seed-{chain.seed}-{setting.name}.json"
    stored: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    wanted = methods_for(setting.protocol, chain.seed, EVERY_SEED if options.rows == ["first"] else options.rows)
    missing = {name: method for name, method in wanted.items() if name not in stored.get("methods", ())}
    if missing:
        found = merging.run(chain, setting, methods=missing)
        _tell(path, merging.together(stored, found) if stored else found)


def _settings(options: argparse.Namespace) -> list[Setting]:
    known = {setting.name: setting for setting in all_settings()}
    unknown = [name for name in options.settings or () if name not in known]
    if unknown:
        raise LataError(f"unknown setting {first_three(unknown)}; the settings are {', '.join(known)}")
    if options.all_settings:
        return list(known.values())
    return [known[name] for name in options.settings] if options.settings else settings()


def _tell(path: Path, found: dict[str, Any]) -> None:
    write_json(path, found)
    sys.stderr.write(f"{path}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("seed", help="all parts, or one, for one seed")
    one.add_argument("seed", type=int)
    several = commands.add_parser("all", help="all parts, or one, for several seeds")
    several.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    for command in (one, several):
        command.add_argument("--part", choices=(*PARTS, "variants", "all"), default="all")
        chosen = command.add_mutually_exclusive_group()
        chosen.add_argument("--settings", nargs="+", help="of merging, by name; a triple and a pair of each kind unless given")
        chosen.add_argument("--all-settings", action="store_true", help="every triple and pair, those where little can be told among them")
        command.add_argument(
            "--rows",
            nargs="+",
            help="of merging, by name, or 'first' for those that every seed runs, whose results have a folder of their own; all unless given",
        )
        command.add_argument("--work", type=Path, default=Path("methods-work"), help="folder of the trained models")
        command.add_argument("--data", type=Path, help="folder with the real text; the environment variable LATA_DATA unless given")
    real.add_arguments(commands.add_parser("real", help=real.HELP))
    page = commands.add_parser("page", help="tables and figures of the results")
    for command in (one, several, page):
        command.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LataError as error:
        sys.exit(f"study: {error}")
