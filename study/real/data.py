"""The data sets that experts learn: rows to train on, to choose scales by and to test with, drawn by the seed of a fine-tune.

They are read from the folder that LATA_DATA names. The test rows are the same for every seed, but for facts: a fact is either known or not, so
its rows are tested on what was trained.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.rows.schema import Sample, pair

VALIDATION_SHARE = 0.1
"""Of the training pool, drawn by the seed."""
AUTHOR_ROWS = 20
"""Rows about one author of TOFU, which follow one another."""
_INTENT = "Name the intent of this request in a few words.\n"


@dataclass(frozen=True)
class Rows:
    """The rows of one data set for one seed.

    Attributes:
        train, validation, test: In the order in which they were drawn; no row of ``train`` is in the others, except for facts.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]


@dataclass(frozen=True)
class DataSet:
    """How a data set is read.

    Attributes:
        read: Takes the folder of the data set, and returns the training pool and the test rows; without test rows they are drawn from the pool.
        short: Whether answers are so short that exact match means something.
        facts: Whether the rows are facts, which are tested on the rows that are trained.
    """

    read: Callable[[Path], tuple[list[Sample], list[Sample]]]
    short: bool = False
    facts: bool = False


def rows_of(name: str, data: Path, seed: int, count: int | None = None) -> Rows:
    """Draw the rows of a data set.

    Args:
        name: One of ``DATA_SETS``.
        data: The folder that LATA_DATA names.
        seed: Of the draw.
        count: Most training rows; of TOFU this is rounded down to whole authors.

    Raises:
        SourceError: A file is missing.
        CorruptFileError: A file has another form.
        LataError: The data set is unknown, or too small.
    """
    if name not in DATA_SETS:
        raise LataError(f"unknown data set {name!r}; choose one of {', '.join(DATA_SETS)}")
    kind, (pool, test) = DATA_SETS[name], read(name, data)
    draw = random.Random(f"{name}/{seed}")
    if kind.facts:
        facts = [fact for author in draw.sample(authors(pool), (count or AUTHOR_ROWS) // AUTHOR_ROWS or 1) for fact in author]
        # Every fourth fact chooses the scale.
        return Rows(facts, facts[::4], [fact for number, fact in enumerate(facts) if number % 4])
    if pool[0].form == "text":
        border = round(len(pool) * (1 - VALIDATION_SHARE))
        return _checked(name, Rows(pool[:border][:count], pool[border:], test))
    if not test:
        # The same test rows for every seed.
        pool, test = [row for number, row in enumerate(pool) if number % 5], _spread(pool[::5])
    shuffled = draw.sample(pool, len(pool))
    border = max(1, round(len(shuffled) * VALIDATION_SHARE))
    return _checked(name, Rows(shuffled[border:][:count], shuffled[:border], test))


def read(name: str, data: Path) -> tuple[list[Sample], list[Sample]]:
    """Return the training pool and the test rows of a data set; errors as for ``rows_of``."""
    folder = data / name
    try:
        return DATA_SETS[name].read(folder)
    except OSError as error:
        raise SourceError(
            f"the data set {name} cannot be read: {error.filename or folder} ({error.strerror}). Set LATA_DATA or --data."
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptFileError(f"the files in {folder} have another form than {name} ({error!r})") from error


def authors(facts: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Return the rows of TOFU author by author."""
    return [facts[begin : begin + AUTHOR_ROWS] for begin in range(0, len(facts), AUTHOR_ROWS)]


def labelled(name: str, data: Path, seed: int, count: int) -> tuple[Rows, tuple[str, ...]]:
    """Return texts with labels, for a classifier, and the names of all classes in alphabetical order; errors as for ``rows_of``."""
    pool, test = ([Sample("text", text=row.prompt.removeprefix(_INTENT), label=row.answer) for row in rows] for rows in read(name, data))
    shuffled = random.Random(f"{name}/{seed}").sample(pool, len(pool))
    border = max(1, round(len(pool) * VALIDATION_SHARE))
    rows = Rows(shuffled[border:][:count], shuffled[:border], random.Random(name).sample(test, len(test)))
    return _checked(name, rows), tuple(sorted({str(row.label) for row in pool}))


def _checked(name: str, rows: Rows) -> Rows:
    sizes = len(rows.train), len(rows.validation), len(rows.test)
    if not all(sizes):
        raise LataError(f"the data set {name} is too small: {sizes[0]} rows to train on, {sizes[1]} for validation, {sizes[2]} to test")
    return rows


def _gsm8k(folder: Path) -> tuple[list[Sample], list[Sample]]:
    train, test = ([_pair(row, "question", "answer") for row in _lines(folder / f"{split}.jsonl")] for split in ("train", "test"))
    return train, test


def _mbpp(folder: Path) -> tuple[list[Sample], list[Sample]]:
    rows = [_pair(row, "text", "code") for row in _lines(folder / "mbpp.jsonl")]
    return rows, []


def _svamp(folder: Path) -> tuple[list[Sample], list[Sample]]:
    rows = json.loads((folder / "SVAMP.json").read_text("utf-8"))
    return [pair(f"{row['Body'].strip()} {row['Question'].strip()}", f"{row['Answer']:g}") for row in rows], []


def _tofu(folder: Path) -> tuple[list[Sample], list[Sample]]:
    # The file holds nine tasks; the rows of the first are those that the authors of the data set mean by forget10.
    forgotten = [row for row in _lines(folder / "forget10.jsonl") if row.get("task_id", "1") == "1"]
    return [_pair(row, "question", "answer") for row in (*forgotten, *_lines(folder / "retain90.jsonl"))], []


def _clinc150(folder: Path) -> tuple[list[Sample], list[Sample]]:
    content = json.loads((folder / "data_full.json").read_text("utf-8"))
    train, test = ([_intent(text, label) for text, label in content[split]] for split in ("train", "test"))
    return train, _spread(test)


def _banking77(folder: Path) -> tuple[list[Sample], list[Sample]]:
    found = []
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            found.append([_intent(row["text"], row["category"]) for row in csv.DictReader(file)])
    return found[0], _spread(found[1])


def _django(folder: Path) -> tuple[list[Sample], list[Sample]]:
    said, code = ((folder / f"all.{kind}").read_text("utf-8").splitlines() for kind in ("anno", "code"))
    rows = [pair(one.strip(), other.strip()) for one, other in zip(said, code, strict=True) if one.strip() and other.strip()]
    return rows, []


def _wikitext2(folder: Path) -> tuple[list[Sample], list[Sample]]:
    # The published training part is not among the files: the validation part is learned, but for its end.
    pool, test = (_paragraphs((folder / f"{split}.txt").read_text("utf-8")) for split in ("valid", "test"))
    return pool, test


def _books(folder: Path) -> tuple[list[Sample], list[Sample]]:
    rows = [row for path in sorted(folder.glob("*.txt")) for row in _paragraphs(path.read_text("utf-8", "replace"))]
    border = round(len(rows) * (1 - VALIDATION_SHARE))
    return rows[:border], rows[border:]


def _self_instruct(folder: Path) -> tuple[list[Sample], list[Sample]]:
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for task in _lines(path):
            for case in task["instances"]:
                question, answer = f"{task['instruction']}\n{case['input']}".strip(), case["output"].strip()
                if question and answer:
                    rows.append(pair(question, answer))
    return rows, []


def _pair(row: Mapping[str, Any], question: str, answer: str) -> Sample:
    return pair(row[question].replace("\r\n", "\n").strip(), row[answer].replace("\r\n", "\n").strip())


def _intent(text: str, label: str) -> Sample:
    return pair(f"{_INTENT}{text.strip()}", label.replace("_", " ").strip().lower())


def _paragraphs(text: str) -> list[Sample]:
    """Return a text in parts of a few kilobytes, each of whole lines."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if sum(map(len, parts[-1])) > 4096:
            parts.append([])
        parts[-1].append(line)
    return [Sample("text", text="".join(part)) for part in parts if "".join(part).strip()]


def _spread(rows: list[Sample]) -> list[Sample]:
    """Return rows that are sorted by class in an order in which a part of them holds all classes."""
    return random.Random("test").sample(rows, len(rows))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


DATA_SETS: dict[str, DataSet] = {
    "gsm8k": DataSet(_gsm8k),
    "mbpp": DataSet(_mbpp),
    "svamp": DataSet(_svamp, short=True),
    "tofu": DataSet(_tofu, short=True, facts=True),
    "clinc150": DataSet(_clinc150, short=True),
    "banking77": DataSet(_banking77, short=True),
    "django": DataSet(_django),
    "wikitext2": DataSet(_wikitext2),
    "books": DataSet(_books),
    "self_instruct": DataSet(_self_instruct),
}
