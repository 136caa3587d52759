"""``lata tune``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_format, add_model, add_start, note, point_progress, print_json
from lata_lightning.cli.models import add_head, add_loading, add_rows, heads_of, load, running
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import LataError
from lata_lightning.evaluation.metric_names import MetricName
from lata_lightning.layers import Level
from lata_lightning.linearity.methods import MatrixMethod, Method
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting

if TYPE_CHECKING:
    from lata_lightning.evaluation.curves import Tuning
    from lata_lightning.rows.schema import Sample
    from lata_lightning.vectors.task_vector import TaskVector

_UNDECIDED = (
    "Exact match is 0 at every point, so nothing is chosen. Choose by how likely the answers are: --metric perplexity, which tells models apart that "
    "answer nothing exactly."
)


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("onto", metavar="ONTO", help="Model to add to, or to take off: directory or hub id.")
    parser.add_argument("vectors", metavar="VECTOR", nargs="+", help="Saved vectors, or tuned models, whose vector is tuned − ONTO.")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        required=True,
        help="Files of validation data, with rows as for lata evaluate; with --forget, of what is to be forgotten.",
    )
    parser.add_argument(
        "--forget", type=bool, default=False, help="Take the vectors off, and choose what leaves least of the validation score."
    )
    parser.add_argument("--control", metavar="FILE", nargs="+", default=[], help="With --forget: files of what must not suffer.")
    parser.add_argument("--keep", type=float, default=0.95, help="With --forget: share of the control performance to keep.")
    parser.add_argument(
        "--grid",
        type=float,
        nargs="+",
        default=[],
        help="Scales to try, all of them; 0, the model itself, always is. By default a few from 0.1 to 2 until the scores have turned, then finer ones "
        "around the best: at most 11 for each rule.",
    )
    parser.add_argument(
        "--metric",
        type=MetricName | None,
        help="What to choose by. By default what suits the rows: exact_match, for text perplexity, for text and label accuracy.",
    )
    add_head(parser)
    add_rows(parser)
    parser.add_argument("--instruction", type=str | None, help="Instruction vector (instruct − base) to measure the alignment with.")
    parser.add_argument(
        "--weighting",
        type=Weighting,
        nargs="+",
        default=[],
        help="Rules to try, 'none' for plain task arithmetic. By default 'none', and with an alignment 'linear' too, or 'threshold' with --forget.",
    )
    parser.add_argument(
        "--method",
        type=Method,
        nargs="+",
        default=["sum"],
        help="Ways to combine several vectors, all of which are tried, as in lata merge: 'sum' under each rule of --weighting, the others without a "
        "rule and, unless there is a --grid, beginning at scale 1.",
    )
    parser.add_argument("--level", type=Level, default="block", help="Unit of the coefficients.")
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, help="For the rule 'threshold': layers aligned this far get coefficient 0."
    )
    parser.add_argument("--outside", type=float, default=0.0, help="Coefficient of whatever is in no layer, under a rule.")
    add_start(parser)
    add_model(parser)
    parser.add_argument("--figure", type=bool, default=True, help="Draw the curves as PNG and SVG; needs matplotlib.")
    parser.add_argument("--output", required=True, help="Directory to write tune.json and the figures to.")
    add_loading(parser)
    add_format(parser)
    add_writing(parser)


def _run(options: Namespace, command: str) -> None:
    from lata_lightning.evaluation.heads import scored_with
    from lata_lightning.evaluation.questions import prepare, read_data
    from lata_lightning.evaluation.tuning import tune, under_rules
    from lata_lightning.linearity.from_vectors import merge_matrices
    from lata_lightning.merging.open_vector import added_to, open_vector
    from lata_lightning.merging.weigh import applied
    from lata_lightning.store.opening import open_source
    from lata_lightning.store.output_policy import end_dry_run
    from lata_lightning.store.writer import atomic_directory, check_free_directory, write_json
    from lata_lightning.vectors.aligning import check_same_model, check_same_start
    from lata_lightning.vectors.task_vector import TaskVector

    if options.forget != bool(options.control):
        raise LataError("--forget needs --control FILE: data whose score must not suffer, and --control is for --forget only")
    methods = _methods(options)
    _check_figure(options)
    check_free_directory(Path(options.output))
    rows = {path: read_data(path) for path in dict.fromkeys((*options.data, *options.control))}
    metric = _metric(options, rows)
    heads = heads_of(options, (*options.data, *options.control), [metric])
    _note_few(options, rows)
    instruction = None if options.instruction is None else TaskVector.open(options.instruction, check_config=options.check_config)
    # Refuses a model that neither ONTO nor a tuned model holds.
    added_to(options.onto, options.vectors, options.model)
    settings = {"start": options.start, "check_config": options.check_config, "model": options.model}
    vectors = [open_vector(path, options.onto, **settings)[0] for path in options.vectors]
    rules = _rules(options, vectors) if "sum" in options.method else []
    weighted = under_rules(
        vectors,
        rules,
        instruction,
        level=options.level,
        threshold=options.threshold,
        outside=options.outside,
        check_base=options.check_base,
    )
    whole, start = [vector.unweighted() for vector in vectors], open_source(options.onto)
    weighted |= {method: [merge_matrices(whole, method, start=start, check_base=options.check_base)] for method in methods}
    check_same_model(start, vectors)
    if (ranking := next((rule for rule in rules if rule != "none"), None)) is not None:
        for vector in weighted[ranking]:
            for sentence in applied(vector)[1:]:
                note(sentence)
    if options.check_base:
        check_same_start(weighted[next(iter(weighted))])
    end_dry_run(Path(options.output))
    model, tokenizer = load(options, options.onto, classifier=metric == "accuracy", heads=list(heads.values()))
    scores: dict[str, Callable[[Any], float]] = {
        path: prepare(metric, tokenizer, samples, options.context_length, template=options.template, name=path)
        for path, samples in rows.items()
    }
    scores |= {path: scored_with(head, scores[path], options.onto) for path, head in heads.items()}
    scorers, controls = ({name: scores[path] for name, path in side.items()} for side in _sides(options))
    stored = open_source(options.onto)
    dtypes = {name: stored.dtype(name) for name in stored.names}
    with atomic_directory(Path(options.output)) as directory:
        with point_progress("tune") as progress, running(options, model):
            tuning = tune(
                model,
                weighted,
                scorers,
                metric=metric,
                grid=options.grid or None,
                made_into_one=methods,
                control=controls,
                control_share=options.keep,
                dtypes=dtypes,
                progress=progress,
            )
        write_json(directory / "tune.json", {**tuning.to_json(), "command": command})
        if options.figure:
            from lata_lightning.display.pictures import save

            save(tuning.chart(), directory)
    _show(options, tuning)


def _sides(options: Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files of validation data and of control data, by name."""
    from lata_lightning.evaluation.questions import names_of

    return names_of(options.data), names_of(options.control)


def _metric(options: Namespace, rows: Mapping[str, Sequence[Sample]]) -> MetricName:
    """Return the metric to choose by."""
    from lata_lightning.evaluation.questions import metric_of

    if options.metric is not None:
        metric: MetricName = options.metric
        return metric
    suiting = {path: metric_of(samples) for path, samples in rows.items()}
    if len(set(suiting.values())) > 1:
        raise LataError(
            f"one metric must suit all files; {', '.join(f'{path} suits {metric}' for path, metric in suiting.items())}. Give --metric perplexity, "
            "or files of one kind."
        )
    return next(iter(suiting.values()))


def _check_figure(options: Namespace) -> None:
    from importlib.util import find_spec

    if options.figure and find_spec("matplotlib") is None:
        raise LataError("the figure needs matplotlib: pip install 'lata_lightning[report]', or go without one (--figure false)")


def _note_few(options: Namespace, rows: Mapping[str, Sequence[Sample]]) -> None:
    from lata_lightning.evaluation.questions import distinct
    from lata_lightning.evaluation.tuning import FEW_ROWS

    for side, more in zip(_sides(options), ("", " (control)"), strict=True):
        for name, path in side.items():
            count = distinct(rows[path])
            if count < FEW_ROWS:
                note(f"{name}{more} has {count} distinct rows; a scale chosen on fewer than {FEW_ROWS} may not hold on other data")


def _methods(options: Namespace) -> list[MatrixMethod]:
    """Return the methods to try that make one vector of all."""
    methods = [method for method in dict.fromkeys(options.method) if method != "sum"]
    if methods and options.forget:
        raise LataError(f"--method {methods[0]} makes one vector of several to merge; with --forget the vectors are taken off as they are")
    if methods and len(options.vectors) == 1:
        raise LataError(f"--method {methods[0]} makes one vector of several, and there is only one: {options.vectors[0]}")
    if options.weighting and "sum" not in options.method:
        raise LataError(
            f"--method {methods[0]} takes vectors whole, so --weighting cannot be given; add 'sum' to the methods to try rules too"
        )
    return methods


def _rules(options: Namespace, vectors: list[TaskVector]) -> list[Weighting]:
    if options.weighting:
        return list(dict.fromkeys(options.weighting))
    if options.instruction is None and not all(vector.manifest.alignment is not None for vector in vectors):
        return ["none"]
    return ["none", "threshold" if options.forget else "linear"]


def _show(options: Namespace, tuning: Tuning) -> None:
    from lata_lightning.display.tables import plain_table, show
    from lata_lightning.evaluation.curves import mean_score

    best = tuning.best
    command = None if tuning.undecided or best.scale == 0 else _next_command(options, best.weighting, best.scale)
    if options.format == "json":
        print_json({**tuning.to_json(), "undecided": tuning.undecided, "next": command})
        return
    sides = ["score"] if tuning.control_share is None else ["to forget", "to keep"]
    rows = [
        (
            f"{point.weighting} ← chosen" if (point.weighting, point.scale) == (best.weighting, best.scale) else point.weighting,
            f"{point.scale:g}",
            *(
                "–" if (value := mean_score(tuning.metric, side)) is None else f"{value:.4g}"
                for side in (point.scores, point.control)[: len(sides)]
            ),
        )
        for point in tuning.points
    ]
    show(plain_table(["weighting", "scale", *sides], rows, f"{tuning.metric}, mean over files"))
    if tuning.undecided:
        sys.stdout.write(f"{_UNDECIDED}\n")
    else:
        sys.stdout.write(f"{command or 'No scale above 0 is better than the model as it is.'}\n")


def _next_command(options: Namespace, weighting: str, scale: float) -> str:
    """Return the command that writes the chosen model; several vectors are subtracted by a merge at a negative scale."""
    one = options.forget and len(options.vectors) == 1
    chosen = "--method" if weighting in options.method else "--weighting"
    words = ["lata", "forget" if one else "merge", options.onto, *options.vectors, chosen, weighting]
    words.append(f"--scale={-scale if options.forget and not one else scale:g}")
    if options.instruction is not None and chosen == "--weighting":
        words += ["--instruction", options.instruction]
    checks = {"start": None, "check_base": True, "check_config": True}
    # Nothing but a rule has a level, and the command refuses what has no effect.
    settings = {} if weighting == "none" or chosen == "--method" else {"level": "block", "threshold": DEFAULT_THRESHOLD, "outside": 0.0}
    for name, default in (settings | checks).items():
        if options[name] != default:
            words += [f"--{name.replace('_', '-')}", str(options[name]).lower()]
    return shlex.join([*words, "--output", "MODEL"])


COMMANDS = {
    "tune": Command("Choose rule and scale on validation data, without writing a model for every point.", _arguments, _run),
}
