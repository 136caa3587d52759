"""Questions and texts to score a model by, from JSONL files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_three
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.evaluation.answers import AnswerPerplexity
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.store.directories import json_rows

MetricName = Literal["exact_match", "perplexity"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
_PROMPTS = ("prompt", "question")
_ANSWERS = ("answer", "completion")


class Question(NamedTuple):
    """One row of a file of questions.

    Attributes:
        prompt: What is asked.
        answer: The right answer.
        paraphrased: The right answer in other words; None where there is none.
        perturbed: Wrong answers of the same form.
    """

    prompt: str
    answer: str
    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a JSONL file, in its order.

    A row has a ``prompt`` or ``question`` and an ``answer`` or ``completion``, or it has two ``messages``, of user and assistant. It may
    have a ``paraphrased_answer``, and a ``perturbed_answer``: one text or a list of them, as the rows of TOFU do.

    Raises:
        SourceError: The file cannot be read.
        CorruptFileError: A line is no JSON object.
        LataError: A row has other fields, or there is no row.
    """
    rows = _read(path)
    found = [_question(row) for row in rows]
    odd = [
        f"line {number}: {', '.join(row)}"
        for number, (row, question) in enumerate(zip(rows, found, strict=True), start=1)
        if question is None
    ]
    if odd:
        raise LataError(
            f"the rows of {path} must have 'prompt' and 'answer' (or 'question', 'completion', or 'messages'); others are {first_three(odd)}"
        )
    return [question for question in found if question is not None]


def read_texts(path: str | Path) -> list[str]:
    """The ``text`` of each row of a JSONL file, in its order.

    Raises:
        SourceError, CorruptFileError, LataError: As for ``read_questions``.
    """
    rows = _read(path)
    odd = [f"line {number}: {', '.join(row)}" for number, row in enumerate(rows, start=1) if not isinstance(row.get("text"), str)]
    if odd:
        raise LataError(f"the rows of {path} must all have a 'text'; others are {first_three(odd)}")
    return [row["text"] for row in rows]


def prepare(metric: MetricName, tokenizer: Any, path: str | Path, context_length: int = 128) -> Callable[[Any], float]:
    """A score of models on one JSONL file, which is read and turned into tokens once.

    Args:
        metric: ``exact_match``: share of the questions answered exactly, in [0, 1]. ``perplexity``: of the ``text`` of the rows, joined by the end
            token and read in windows; or, in a file of questions, of the answers given the questions. At least 1, lower is better.
        tokenizer: Hugging Face tokenizer of the models.
        path: The file.
        context_length: Tokens of a window of text.

    Raises:
        SourceError, CorruptFileError: The file cannot be read.
        LataError: The metric is unknown, or cannot be taken on these rows.
    """
    if metric not in METRICS:
        raise LataError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if metric == "perplexity" and "text" in _read(path)[0]:
        return Perplexity(tokenizer, (tokenizer.eos_token or "\n\n").join(read_texts(path)), context_length)
    pairs = [(question.prompt, question.answer) for question in read_questions(path)]
    return ExactMatch(tokenizer, pairs) if metric == "exact_match" else AnswerPerplexity(tokenizer, pairs)


def distinct(path: str | Path) -> int:
    """How many different rows a JSONL file has."""
    return len({json.dumps(row, sort_keys=True) for row in _read(path)})


def names_of(paths: Sequence[str | Path]) -> dict[str, str]:
    """The path of each file by a name for it: the file's without its ending.

    Raises:
        LataError: Two files have one name.
    """
    names = [Path(path).name.removesuffix(".jsonl") for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise LataError(f"scores are named after the files, so files need different names; the same are {first_three(twice)}")
    return {name: str(path) for name, path in zip(names, paths, strict=True)}


def _read(path: str | Path) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_text("utf-8").split("\n")  # Not splitlines(), which also splits at marks that JSON strings may hold.
    except OSError as error:
        raise SourceError(f"{path} cannot be read as JSONL: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is no UTF-8 text ({error.reason})") from error
    rows = list(json_rows(lines, path))
    if not rows:
        raise LataError(f"{path} holds no rows")
    return rows


def _question(row: Mapping[str, Any]) -> Question | None:
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) == 2 and [turn.get("role") for turn in messages] == ["user", "assistant"]:
        prompt, answer = (turn.get("content") for turn in messages)
    else:
        prompt, answer = (next((row[name] for name in names if name in row), None) for names in (_PROMPTS, _ANSWERS))
    paraphrased, perturbed = row.get("paraphrased_answer"), row.get("perturbed_answer") or []
    wrong = [perturbed] if isinstance(perturbed, str) else perturbed
    if not all(isinstance(text, str) for text in (prompt, answer, *wrong)) or not isinstance(paraphrased, str | None):
        return None
    return Question(str(prompt), str(answer), paraphrased, tuple(wrong))
