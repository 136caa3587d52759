"""``lata evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_format, note
from lata_lightning.cli.models import add_head, add_loading, add_rows, heads_of, load, running
from lata_lightning.cli.scores import Row, by_metric, counts_and_intervals, finite, measured, of_tasks, show_scores
from lata_lightning.cli.shipped import as_typed
from lata_lightning.cli.writing import add_writing
from lata_lightning.errors import LataError
from lata_lightning.evaluation.metric_names import MetricName
from lata_lightning.store.directories import SCORES_NAME
from lata_lightning.store.output_policy import end_dry_run

_TASKS = "tasks.json"


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="Model directories or hub ids; several are shown in one table.")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="Files to score by --metric: rows with prompt and answer (or completion), question and answer, messages, text, or text and label.",
    )
    parser.add_argument(
        "--metric",
        type=MetricName,
        nargs="+",
        default=[],
        help="One metric or several. exact_match: share of answers that are right; perplexity: of the text, or of the answers; accuracy: share of "
        "labels that a classifier gives. By default what suits the rows: exact_match, for text perplexity, for text and label accuracy.",
    )
    add_head(parser)
    add_rows(parser)
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=[], help="Tasks of lm-evaluation-harness, by name or as a task file (.yaml)."
    )
    parser.add_argument("--limit", type=int | None, help="With --tasks: only so many examples of each.")
    parser.add_argument("--num-fewshot", type=int | None, help="With --tasks: examples before each question.")
    parser.add_argument("--chat", type=bool, default=False, help="With --tasks: ask in the tokenizer's chat format.")
    parser.add_argument("--batch-size", type=int, default=8, help="With --tasks: rows of a batch.")
    parser.add_argument(
        "--forget", metavar="FILE", type=str | None, help="JSONL file of what was to be forgotten: take the measures of unlearning."
    )
    parser.add_argument("--retain", metavar="FILE", type=str | None, help="With --forget: what is to be kept.")
    parser.add_argument("--real-authors", metavar="FILE", type=str | None, help="With --forget: TOFU's questions on real authors.")
    parser.add_argument("--world-facts", metavar="FILE", type=str | None, help="With --forget: TOFU's questions on world facts.")
    parser.add_argument(
        "--reference", metavar="MODEL", type=str | None, help="With --forget: a model retrained without it, or the _EVAL.json of one."
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, help="With --forget: most tokens of a generated answer.")
    parser.add_argument("--name", default="UNLEARNING", help="With --forget: what the result files begin with.")
    parser.add_argument("--output", type=str | None, help="Directory for the results as JSON; needed with --forget.")
    add_loading(parser)
    add_format(parser)
    add_writing(parser)


def _run(options: Namespace, command: str) -> None:
    given = [name for name in ("data", "tasks", "forget") if options[name]]
    if len(given) != 1:
        raise LataError(f"give exactly one of --data, --tasks and --forget to evaluate by; {len(given)} of them are given")
    if options.head and not options.data:
        raise LataError("--head goes with --data FILE, whose rows are texts with labels")
    if options.limit is not None and not options.tasks:
        raise LataError("--limit counts examples of --tasks; for --data give a file with fewer rows")
    {"data": _score_files, "tasks": _run_tasks, "forget": _measure_unlearning}[given[0]](options)


def _score_files(options: Namespace) -> None:
    from lata_lightning.evaluation.heads import with_head
    from lata_lightning.evaluation.questions import metric_of, names_of, prepare, read_data

    _check_output(options, SCORES_NAME)
    data = {name: read_data(path) for name, path in names_of(options.data).items()}
    metrics = {name: list(dict.fromkeys(options.metric)) or [metric_of(samples)] for name, samples in data.items()}
    classifier = any("accuracy" in wanted for wanted in metrics.values())
    if classifier and any(wanted != ["accuracy"] for wanted in metrics.values()):
        asked = ", ".join(f"{name} asks for {' and '.join(wanted)}" for name, wanted in metrics.items())
        raise LataError(
            f"one model cannot be both a classifier and a language model: {asked}. Give these files one by one, or a --metric that "
            "suits all."
        )
    heads = heads_of(options, options.data, (metric for wanted in metrics.values() for metric in wanted))
    _end_dry_run(options, SCORES_NAME)
    rows: list[Row] = []
    for label in options.models:
        model, tokenizer = load(options, label, classifier=classifier, heads=list(heads.values()))
        with running(options, model):
            for path, (name, samples) in zip(options.data, data.items(), strict=True):
                for metric in metrics[name]:
                    measure = prepare(metric, tokenizer, samples, options.context_length, template=options.template, name=path)
                    with with_head(model, heads[path], label) if path in heads else nullcontext():
                        rows.append(measured(as_typed(label), name, metric, measure.score(model)))
    _deliver(options, rows, SCORES_NAME)


def _run_tasks(options: Namespace) -> None:
    from lata_lightning.evaluation.harness import evaluate_tasks

    _check_output(options, _TASKS)
    _end_dry_run(options, _TASKS)
    rows: list[Row] = []
    for label in options.models:
        model, tokenizer = load(options, label)
        with running(options, model):
            results = evaluate_tasks(
                model,
                tokenizer,
                options.tasks,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                chat=options.chat,
                batch_size=options.batch_size,
            )
        rows += of_tasks(as_typed(label), results)
    _deliver(options, rows, _TASKS)


def _measure_unlearning(options: Namespace) -> None:
    from lata_lightning.evaluation.unlearning import UnlearningEvaluation, reference_ratios
    from lata_lightning.store.writer import replace_json

    if options.output is None or Path(options.name).name != options.name:
        raise LataError("the measures of unlearning are written to files: give --output DIRECTORY, and a --name without slashes")
    if len(options.models) > 1:
        raise LataError(f"the measures of unlearning are taken of one model at a time; {len(options.models)} are given")
    directory = Path(options.output)
    targets = [directory / f"{options.name}_{kind}.json" for kind in ("EVAL", "SUMMARY")]
    _refuse_existing(*targets)
    sets = {"retain": options.retain, "real_authors": options.real_authors, "world_facts": options.world_facts}
    end_dry_run(targets[0])
    model, tokenizer = load(options, options.models[0])
    measure = UnlearningEvaluation(
        tokenizer, options.forget, {name: path for name, path in sets.items() if path is not None}, options.max_new_tokens
    )
    reference = None
    if options.reference is not None:
        if Path(options.reference).is_file():
            reference = reference_ratios(options.reference)
        else:
            other = load(options, options.reference)[0]
            with running(options, other):
                reference = measure.truth_ratios(other)
    with running(options, model):
        measures = measure(model, reference)
    for target, data in zip(targets, (measures.evaluation, measures.summary), strict=True):
        replace_json(target, data)
    for sentence in measures.notes:
        note(sentence)
    summary = [Row(options.models[0], options.name, name, finite(value)) for name, value in measures.summary.items()]
    show_scores(summary, options.format)
    note(f"written to {targets[0]} and {targets[1]}")


def _check_output(options: Namespace, file: str) -> None:
    """Refuse an output that exists, or that would be of several models, before anything is scored."""
    if options.output is None:
        return
    if len(options.models) > 1:
        raise LataError(
            f"--output keeps the scores of one model, and {len(options.models)} are given: score them one by one, or keep what --format json prints"
        )
    _refuse_existing(Path(options.output) / file)


def _end_dry_run(options: Namespace, file: str) -> None:
    """End a dry run before models are loaded; refuse one of a command that would write nothing."""
    if options.output is not None:
        end_dry_run(Path(options.output) / file)
    elif options.dry_run:
        raise LataError("--dry-run shows what would be written, and without --output nothing is: leave it out")


def _deliver(options: Namespace, rows: Sequence[Row], file: str) -> None:
    """Write the scores if an output is given, and show them."""
    from lata_lightning.store.writer import replace_json

    if options.output is not None:
        sure = counts_and_intervals(rows)
        replace_json(Path(options.output) / file, {"model": options.models[0], "scores": by_metric(rows), "sample": sure})
    show_scores(rows, options.format)


def _refuse_existing(*targets: Path) -> None:
    from lata_lightning.store.writer import check_free

    for target in targets:
        check_free(target)


COMMANDS = {
    "evaluate": Command(
        "Score models: on files of rows, on tasks of lm-evaluation-harness, or by what they have forgotten and kept.", _arguments, _run
    ),
}
