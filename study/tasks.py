"""What the models learn and how they are scored: generated exercises with one right answer, and text of real data sets.

Training, validation and test problems are distinct, whatever the seed. Real text is read from the folder that the environment variable LATA_DATA names,
which holds ``wikitext2/{valid,test}.txt``, ``gsm8k/{train,test}.jsonl``, ``mbpp/mbpp.jsonl``, ``self_instruct/*.jsonl`` and ``books/*.txt``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from lata_lightning.errors import LataError
from lata_lightning.evaluation.accuracy import ExactMatch
from lata_lightning.evaluation.answers import AnswerPerplexity
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.quickstart.corpus import held_out_text, standard_library_texts
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, SKILLS, Exercise, exercises
from lata_lightning.quickstart.make_checkpoints import make_tokenizer

Split = Literal["train", "validation", "test"]
Pair = tuple[str, str]

SKILL_TASKS = ("compute", "reverse", "sort")
UNWANTED = "encode"
"""A skill that instruct has not seen at all, to be forgotten."""
TEXT_TASKS = ("wikitext2", "gsm8k", "mbpp")
INSTRUCT = "instruct"
"""The instruct skills as one more task to be scored on."""

CONTEXT = 176
"""Tokens of a raw window, and the most a chat row may have."""
PROMPT_BYTES, ANSWER_BYTES = 40, 120
TRAINING_EXERCISES = 4_000
# These skills have few problems; of 20 residues of a problem's hash ten are for training.
TRAINING_EXERCISES_OF = {"compute": 780, "next": 3_000}
SEEN_EXERCISES = 200
"""So many exercises of each skill of the track are among what instruct is trained on, so that it has a part of the skill, as a real instruct model has of
code or mathematics. A skill that a small model has not at all appears in an expert all at once, and then no merge keeps any of it."""
PROBLEMS = {"validation": 200, "test": 400}
INSTRUCT_PROBLEMS = {"validation": 40, "test": 60}
TOKENS = {"validation": 8_192, "test": 16_384}
HELD_OUT_SEED = 0


class Task(Protocol):
    """Something to learn, with training rows and a score."""

    name: str
    track: Literal["skills", "text"]
    raw: bool

    def rows(self, seed: int) -> Sequence[Any]:
        """Training rows: (prompt, answer) pairs, or documents if ``raw``."""

    def score(self, model: Any, split: Split) -> float:
        """Exact match in [0, 1] (skills, higher is better), or held-out loss in nats per token (text, lower is better)."""


class SkillTask:
    """Exercises of one or several skills.

    Attributes:
        name: Of the task.
        track: ``"skills"``.
        raw: Whether training rows are documents; they are pairs.
        skills: Whose exercises are asked, each the same number.
    """

    track: Literal["skills", "text"] = "skills"
    raw = False

    def __init__(self, name: str, skills: Sequence[str]) -> None:
        self.name = name
        self.skills = tuple(skills)

    def rows(self, seed: int) -> list[Exercise]:
        """Distinct training exercises."""
        return [exercise for skill in self.skills for exercise in training_exercises(skill, seed)]

    def score(self, model: Any, split: Split) -> float:
        """Exact match over the held-out problems, in [0, 1]."""
        return self._match(split)(model)

    @cache  # noqa: B019 - tasks live as long as the process
    def _match(self, split: Split) -> ExactMatch:
        count = (PROBLEMS if len(self.skills) == 1 else INSTRUCT_PROBLEMS)[split]
        return ExactMatch(tokenizer(), [pair for skill in self.skills for pair in problems(skill, split, count, HELD_OUT_SEED)])


class ChatTextTask:
    """Questions and answers of a data set; the loss of the answers is scored.

    Attributes:
        name: Of the task.
        track: ``"text"``.
        raw: Whether training rows are documents; they are pairs.
    """

    track: Literal["skills", "text"] = "text"
    raw = False

    def __init__(self, name: str) -> None:
        self.name = name

    def rows(self, seed: int) -> list[Pair]:
        """All training pairs, the same for every seed."""
        return self._pairs("train")

    def score(self, model: Any, split: Split) -> float:
        """Held-out loss of the answers, in nats per byte."""
        return math.log(self._answers(split)(model))

    @cache  # noqa: B019
    def _answers(self, split: Split) -> AnswerPerplexity:
        return AnswerPerplexity(tokenizer(), self._pairs(split))

    @cache  # noqa: B019
    def _pairs(self, split: Split) -> list[Pair]:
        pairs = {"gsm8k": _gsm8k, "mbpp": _mbpp}[self.name](split)
        if split == "train":
            return pairs
        kept, tokens = [], 0
        for pair in pairs:
            if tokens >= TOKENS[split]:
                break
            kept.append(pair)
            tokens += len(pair[1].encode()) + 1
        return kept


class RawTextTask:
    """Documents of a data set, learned and scored whole.

    Attributes:
        name: Of the task.
        track: ``"text"``.
        raw: Whether training rows are documents; they are.
    """

    track: Literal["skills", "text"] = "text"
    raw = True

    def __init__(self, name: str) -> None:
        self.name = name

    def rows(self, seed: int) -> list[str]:
        """The training text as one document."""
        return [self._text("train")]

    def score(self, model: Any, split: Split) -> float:
        """Held-out loss in nats per byte."""
        return math.log(self._perplexity(split)(model))

    @cache  # noqa: B019
    def _perplexity(self, split: Split) -> Perplexity:
        return Perplexity(tokenizer(), _spread(self._text(split), TOKENS[split]), CONTEXT)

    def _text(self, split: Split) -> str:
        folder = data_folder() / self.name
        if split == "test":
            return (folder / "test.txt").read_text(encoding="utf-8")
        lines = (folder / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        border = len(lines) * 9 // 10
        return "".join(lines[:border] if split == "train" else lines[border:])


TASKS: dict[str, Task] = {
    **{name: SkillTask(name, [name]) for name in (*SKILL_TASKS, UNWANTED)},
    INSTRUCT: SkillTask(INSTRUCT, INSTRUCT_SKILLS),
    "wikitext2": RawTextTask("wikitext2"),
    "gsm8k": ChatTextTask("gsm8k"),
    "mbpp": ChatTextTask("mbpp"),
}


@cache
def tokenizer() -> Any:
    """The byte-level tokenizer of all models."""
    return make_tokenizer()


def data_folder() -> Path:
    """The folder with real text.

    Raises:
        LataError: The environment variable LATA_DATA does not name a folder.
    """
    folder = os.environ.get("LATA_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise LataError(f"the environment variable LATA_DATA (or --data) must name the folder with the real text, it is {folder!r}")
    return Path(folder)


def training_exercises(skill: str, seed: int) -> list[Exercise]:
    """As many distinct training exercises of a skill as the fine-tunes see."""
    return problems(skill, "train", TRAINING_EXERCISES_OF.get(skill, TRAINING_EXERCISES), seed)


def problems(skill: str, split: Split, count: int, seed: int) -> list[Exercise]:
    """Distinct exercises of a skill of the quickstart, or of one of ``more_skills``."""
    if skill in SKILLS:
        return exercises(skill, split, count, seed)
    # It takes its constants from here.
    from study.more_skills import word_exercises

    return word_exercises(skill, split, count, seed)


@cache
def base_texts(data: Path | None) -> list[str]:
    """What base is pre-trained on: the standard library of the running Python, and the books if there is a folder with data, without their last parts."""
    return [*standard_library_texts(), *(text[: len(text) * 9 // 10] for text in _books(data))]


def base_perplexity(model: Any, split: Split, data: Path | None = None) -> float:
    """Perplexity per byte of held-out text like that base was pre-trained on."""
    return _base_perplexity(split, data)(model)


@cache
def self_instruct(data: Path) -> list[Pair]:
    """Instructions of people with their answers, those that fit into a row."""
    pairs = []
    for path in sorted((data / "self_instruct").glob("*.jsonl")):
        for task in _json_lines(path):
            for case in task["instances"]:
                question = f"{task['instruction']}\n{case['input']}".strip()
                pairs.append((_end(question), _beginning(case["output"])))
    return [pair for pair in pairs if all(pair)]


def text_pairs(rows: Sequence[Any], question: str, answer: str) -> list[Pair]:
    """Rows of a data set as pairs: the end of the question, and as many whole lines of the answer as fit."""
    pairs = [(_end(row[question].replace("\r\n", "\n").strip()), _beginning(row[answer].replace("\r\n", "\n").strip())) for row in rows]
    return [pair for pair in pairs if all(pair)]


@cache
def _base_perplexity(split: Split, data: Path | None) -> Perplexity:
    parts = [held_out_text(), *(text[len(text) * 9 // 10 :] for text in _books(data))]
    halves = [part[: len(part) // 2] if split == "validation" else part[len(part) // 2 :] for part in parts]
    each = TOKENS[split] // len(halves)
    return Perplexity(tokenizer(), "".join(half[:each] for half in halves), CONTEXT)


@cache
def _books(data: Path | None) -> list[str]:
    return [] if data is None else [path.read_text(encoding="utf-8", errors="replace") for path in sorted((data / "books").glob("*.txt"))]


def _gsm8k(split: Split) -> list[Pair]:
    rows = _json_lines(data_folder() / "gsm8k" / ("test.jsonl" if split == "test" else "train.jsonl"))
    if split != "test":
        border = len(rows) * 9 // 10
        rows = rows[:border] if split == "train" else rows[border:]
    return text_pairs(rows, "question", "answer")


def _mbpp(split: Split) -> list[Pair]:
    rows = _json_lines(data_folder() / "mbpp" / "mbpp.jsonl")
    # By residue of the row's number, so that the parts are alike: of 10 rows 7 train, 1 validation, 2 test.
    wanted = {"train": range(7), "validation": range(7, 8), "test": range(8, 10)}[split]
    return text_pairs([row for number, row in enumerate(rows) if number % 10 in wanted], "text", "code")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _end(text: str) -> str:
    """The last whole words of a text."""
    raw = text.encode()
    if len(raw) <= PROMPT_BYTES:
        return text
    return raw[-PROMPT_BYTES:].decode(errors="ignore").partition(" ")[2]


def _beginning(text: str) -> str:
    """The first whole lines of a text, or the first whole words if there is no such line."""
    raw = text.encode()
    if len(raw) <= ANSWER_BYTES:
        return text
    cut = raw[:ANSWER_BYTES].decode(errors="ignore")
    return cut.rpartition("\n" if "\n" in cut.strip() else " ")[0].rstrip()


def _spread(text: str, tokens: int) -> str:
    """Evenly spaced windows of a text, about so many bytes together."""
    windows = max(1, tokens // CONTEXT)
    step = max(CONTEXT, len(text) // windows)
    return "".join(text[start : start + CONTEXT] for start in range(0, step * windows, step))
