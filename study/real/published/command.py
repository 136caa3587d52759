"""The command where a configuration gives its checkpoints: merges of them are streamed from disk and scored."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import LataError

if TYPE_CHECKING:
    from study.real.published.configuration import Configuration

OPTIONS = {
    "texts": None,
    "base": None,
    "instruct": None,
    "expert": [],
    "scales": None,
    "tasks": None,
    "limit": None,
    "run_code": False,
    "device": None,
    "keep": False,
    "seed": 0,
}
"""Options that have a meaning only where checkpoints are given, with their defaults."""


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the arguments that have a meaning only where checkpoints are given."""
    parser.add_argument("--texts", type=Path, help="folder with validation/ and test/, in both DOMAIN.jsonl (prompt, answer) or DOMAIN.txt")
    parser.add_argument("--base", help="another base than the configuration's: directory or hub id")
    parser.add_argument("--instruct", help="another instruct model")
    parser.add_argument("--expert", action="append", default=[], metavar="NAME=MODEL", help="another expert; may be given for several")
    parser.add_argument("--scales", nargs="+", type=float, help="another grid of scales")
    parser.add_argument("--tasks", nargs="*", help="other tasks of lm-evaluation-harness, by name or file; none skips it")
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument(
        "--run-code", action="store_true", help="let tasks such as humaneval run the code that models write, on this machine"
    )
    parser.add_argument("--device", help="where models are scored, such as cuda:0; by default a GPU if there is one")
    parser.add_argument("--keep", action="store_true", help="leave the merged models in the folder; each takes as much disk as a model")
    parser.add_argument("--seed", type=int, default=0, help="of random ranks and tiny models")


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit status. Progress goes to standard error, results to standard output.

    Raises:
        LataError: Something is not as it should be; the message is one line.
    """
    from dataclasses import replace

    from study.real.published.configuration import checked, read_configuration, with_models

    configuration = with_models(read_configuration(options.configuration), options.base, options.instruct, options.expert)
    given: dict[str, Any] = {
        key: tuple(getattr(options, key)) for key in ("methods", "scales", "tasks") if getattr(options, key) is not None
    }
    configuration = checked(replace(configuration, **given))
    if options.plan:
        sys.stdout.write(plan(configuration))
        return 0
    from transformers.utils import logging

    from benchmarks.bench import table
    from study.real.published.benchmark import RESULTS, Benchmark, Options, summary
    from study.real.published.texts import made_texts
    from study.real.published.tiny import tiny_configuration

    # One for every model that is loaded says nothing.
    logging.disable_progress_bar()
    folder = options.work / "real" / f"{configuration.name}{'-tiny' if options.tiny else ''}"
    if options.tiny:
        if options.base or options.instruct or options.expert:
            raise LataError("--tiny makes its own models: leave out --base, --instruct and --expert, or leave out --tiny")
        configuration, own = tiny_configuration(configuration, folder, options.seed)
        texts = options.texts or own
    else:
        texts = options.texts or made_texts(configuration, options.data or os.environ.get("LATA_DATA"), folder)
    how = Options(options.device or ("cpu" if options.tiny else None), options.keep, options.limit, options.run_code, options.seed)
    results = Benchmark(configuration, texts, folder, how, note).run()
    head, *rows = summary(results)
    sys.stdout.write("\n".join(table(head, rows)) + "\n")
    note(f"all figures are in {folder / RESULTS}")
    return 0


def plan(configuration: Configuration) -> str:
    """What a run takes, in lines.

    Raises:
        LataError: The configuration says nothing of the architecture, or transformers does not know it.
    """
    from study.real.published.configuration import needs

    found = needs(configuration)
    models = "\n".join(f"  {name:<10} {model}" for name, model in configuration.models.items())
    return (
        f"models\n{models}\n"
        f"parameters of a model   {found.parameters:,}\n"
        f"disk for all models     {_gigabytes(found.disk)} ({len(configuration.models)} and one merged, {_gigabytes(found.model)} each)\n"
        f"memory to score a model {_gigabytes(found.model)} for weights, {_gigabytes(found.logits)} for the logits of a batch, and activations\n"
        f"memory to merge         below 1 GB\n"
        f"merges                  at most {found.merges}, {_gigabytes(found.merges * found.model)} written in all, one after the other\n"
    )


def note(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"real: {text}\n")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
