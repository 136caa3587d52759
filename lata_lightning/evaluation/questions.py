"""Reading evaluation data, and choosing the metric that suits it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.evaluation.answers import AnswerPerplexity
from lata_lightning.evaluation.classification import Accuracy
from lata_lightning.evaluation.intervals import Measure
from lata_lightning.evaluation.metric_names import METRICS, MetricName
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.rows.reading import read_rows
from lata_lightning.rows.schema import Sample, read_samples
from lata_lightning.rows.tokens import Template


class Question(NamedTuple):
    """One row of a file of questions.

    Attributes:
        prompt: The question.
        answer: The right answer.
        paraphrased: A paraphrase of the right answer; None where there is none.
        perturbed: Wrong answers of the same form.
    """

    prompt: str
    answer: str
    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()


def read_data(path: str | Path) -> list[Sample]:
    """Read the rows of a file or data set, all of one form.

    Raises:
        SourceError, CorruptFileError: The file or data set cannot be read.
        LataError: A row has no accepted form or several, or the rows are of several forms.
    """
    return read_samples(read_rows(path), str(path))


def read_questions(path: str | Path) -> list[Question]:
    """Read the questions of a file, in its order.

    A row is a pair, or has two ``messages``, of user and assistant. It may have a ``paraphrased_answer``, and a ``perturbed_answer`` that is one text or a
    list of texts, as in TOFU.

    Raises:
        SourceError, CorruptFileError: The file cannot be read.
        LataError: A row has other fields, or there is no row.
    """
    rows = read_rows(path)
    samples = read_samples(rows, str(path))
    questions = [_question(sample, row) for sample, row in zip(samples, rows, strict=True)]
    odd = [
        f"row {number}: {', '.join(row)}"
        for number, (row, question) in enumerate(zip(rows, questions, strict=True), start=1)
        if question is None
    ]
    if odd:
        raise LataError(
            f"the rows of {path} must have one question and one answer, and texts in 'paraphrased_answer' and 'perturbed_answer' where they have "
            f"these; others are {first_three(odd)}"
        )
    return [question for question in questions if question is not None]


def metric_of(samples: Sequence[Sample]) -> MetricName:
    """Return the metric that suits some rows: exact match for answers, accuracy for labels, perplexity for texts."""
    first = samples[0]
    if first.form != "text":
        return "exact_match"
    return "perplexity" if first.label is None else "accuracy"


def prepare(
    metric: MetricName | None,
    tokenizer: Any,
    data: str | Path | Sequence[Sample],
    context_length: int = 128,
    *,
    template: Template = "chat",
    name: str = "the data",
) -> Measure:
    """Return a metric of models on some rows, which are turned into tokens once.

    Args:
        metric: ``exact_match``: share of the questions answered exactly, in [0, 1]. ``perplexity``: of the texts, or of the answers given the
            questions; at least 1, lower is better. ``accuracy``: share of the labels that a classifier predicts, in [0, 1]. None takes the one that
            suits the rows.
        tokenizer: Hugging Face tokenizer of the models.
        data: A file, a data set, or rows that have been read already.
        context_length: Largest number of tokens of a window of text, for perplexity.
        template: ``plain`` puts the answer of a pair directly after its prompt.
        name: Name of the rows in messages.

    Raises:
        SourceError, CorruptFileError: The file cannot be read.
        LataError: The metric is unknown, or does not apply to these rows.
    """
    if metric is not None and metric not in METRICS:
        raise LataError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    samples, name = (read_data(data), str(data)) if isinstance(data, str | Path) else (data, name)
    suiting = metric_of(samples)
    if metric is None or metric == suiting:
        metric = suiting
    elif metric != "perplexity":
        suits = " or ".join(dict.fromkeys((suiting, "perplexity")))
        raise LataError(f"{metric} cannot be taken on {name}: {_WANTED[metric]}. These rows suit {suits} (--metric).")
    if metric == "accuracy":
        return Accuracy(tokenizer, samples, name=name)
    if metric == "exact_match":
        return ExactMatch(tokenizer, samples, template=template)
    if suiting == "exact_match":
        return AnswerPerplexity(tokenizer, samples, template=template)
    return Perplexity(tokenizer, [sample.text for sample in samples], context_length)


def distinct(samples: Sequence[Sample]) -> int:
    """Return the number of distinct rows."""
    return len({json.dumps(sample, sort_keys=True, default=str) for sample in samples})


def names_of(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return the path of each file by its name without the ending.

    Raises:
        LataError: Two files have the same name.
    """
    names = [Path(path).name.removesuffix(".jsonl") for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise LataError(f"scores are named after the files, so files need different names; the same are {first_three(twice)}")
    return {name: str(path) for name, path in zip(names, paths, strict=True)}


_WANTED: Mapping[MetricName, str] = {
    "exact_match": "it needs questions with answers, or messages",
    "accuracy": "it needs texts with a label, and a classifier",
}


def _question(sample: Sample, row: Mapping[str, Any]) -> Question | None:
    if [turn["role"] for turn in sample.messages] != ["user", "assistant"]:
        return None
    paraphrased, perturbed = row.get("paraphrased_answer"), row.get("perturbed_answer") or []
    wrong = [perturbed] if isinstance(perturbed, str) else perturbed
    if not all(isinstance(text, str) for text in (sample.prompt, sample.answer, *wrong)) or not isinstance(paraphrased, str | None):
        return None
    return Question(sample.prompt, sample.answer, paraphrased, tuple(wrong))
