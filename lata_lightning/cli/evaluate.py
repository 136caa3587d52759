"""``lata evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from lata_lightning.cli.common import Command, add_format, note, print_json
from lata_lightning.cli.models import add_head, add_loading, add_rows, heads_of, load, running
from lata_lightning.errors import LataError
from lata_lightning.store.directories import SCORES_NAME

_TASKS = "tasks.json"


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Model directory or hub id.")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="Files to score by --metric: rows with prompt and answer (or completion), question and answer, messages, text, or text and label.",
    )
    parser.add_argument(
        "--metric",
        type=Literal["exact_match", "perplexity", "accuracy"] | None,
        help="exact_match: share of answers that are right; perplexity: of the text, or of the answers; accuracy: share of labels that a "
        "classifier gives. By default what suits the rows: exact_match, for text perplexity, for text and label accuracy.",
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
    from lata_lightning.evaluation.heads import scored_with
    from lata_lightning.evaluation.questions import metric_of, names_of, prepare, read_data

    _check_output(options, SCORES_NAME)
    data = {name: read_data(path) for name, path in names_of(options.data).items()}
    metrics = {name: options.metric or metric_of(samples) for name, samples in data.items()}
    classifier = "accuracy" in metrics.values()
    if classifier and len(set(metrics.values())) > 1:
        raise LataError(
            f"one model cannot be both a classifier and a language model: {', '.join(f'{name} asks for {metric}' for name, metric in metrics.items())}. "
            "Give these files one by one, or a --metric that suits all."
        )
    heads = heads_of(options, options.data, metrics.values())
    model, tokenizer = load(options, options.model, classifier=classifier, head=heads.get(options.data[0]))
    scores: dict[str, dict[str, float]] = {}
    with running(options, model):
        for path, (name, samples) in zip(options.data, data.items(), strict=True):
            score = prepare(metrics[name], tokenizer, samples, options.context_length, template=options.template, name=path)
            if path in heads:
                score = scored_with(heads[path], score, options.model)
            scores[name] = {metrics[name]: score(model)}
    _deliver(options, scores, SCORES_NAME)


def _run_tasks(options: Namespace) -> None:
    from lata_lightning.evaluation.harness import evaluate_tasks

    _check_output(options, _TASKS)
    model, tokenizer = load(options, options.model)
    with running(options, model):
        scores = evaluate_tasks(
            model,
            tokenizer,
            options.tasks,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            chat=options.chat,
            batch_size=options.batch_size,
        )
    _deliver(options, scores, _TASKS)


def _measure_unlearning(options: Namespace) -> None:
    from lata_lightning.evaluation.unlearning import UnlearningEvaluation, reference_ratios
    from lata_lightning.store.writer import write_json

    if options.output is None or Path(options.name).name != options.name:
        raise LataError("the measures of unlearning are written to files: give --output DIRECTORY, and a --name without slashes")
    directory = Path(options.output)
    targets = [directory / f"{options.name}_{kind}.json" for kind in ("EVAL", "SUMMARY")]
    _refuse_existing(*targets)
    sets = {"retain": options.retain, "real_authors": options.real_authors, "world_facts": options.world_facts}
    model, tokenizer = load(options, options.model)
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
        found = measure(model, reference)
    directory.mkdir(parents=True, exist_ok=True)
    for target, data in zip(targets, (found.evaluation, found.summary), strict=True):
        write_json(target, data)
    for sentence in found.notes:
        note(sentence)
    _show(options, {options.name: found.summary})
    note(f"written to {targets[0]} and {targets[1]}")


def _check_output(options: Namespace, file: str) -> None:
    """Refuse an output that exists, before anything is scored."""
    if options.output is not None:
        _refuse_existing(Path(options.output) / file)


def _deliver(options: Namespace, scores: dict[str, dict[str, float]], file: str) -> None:
    """Show the scores, and write them if an output is given."""
    import math

    from lata_lightning.store.writer import write_json

    known = {name: {metric: value if math.isfinite(value) else None for metric, value in row.items()} for name, row in scores.items()}
    if options.output is not None:
        target = Path(options.output) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, {"model": options.model, "scores": known})
    _show(options, known)


def _show(options: Namespace, scores: dict[str, dict[str, Any]]) -> None:
    if options.format == "json":
        print_json(scores)
        return
    from lata_lightning.display.tables import plain_table, show

    rows = [(name, metric, "–" if value is None else f"{value:.4g}") for name, row in scores.items() for metric, value in row.items()]
    show(plain_table([options.model, "measure", "score"], rows))


def _refuse_existing(*targets: Path) -> None:
    from lata_lightning.store.writer import check_free

    for target in targets:
        check_free(target)


COMMANDS = {
    "evaluate": Command(
        "Score a model: on JSONL files, on tasks of lm-evaluation-harness, or by what it has forgotten and kept.", _arguments, _run
    ),
}
