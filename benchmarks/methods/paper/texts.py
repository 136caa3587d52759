"""Held-out texts for the ready configurations, made from a folder of data sets as they are published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.methods.paper.configuration import Configuration
from benchmarks.methods.paper.scoring import SPLITS, Split, write_texts
from lata_lightning.errors import LataError, SourceError, first_three
from lata_lightning.store.directories import json_rows
from lata_lightning.store.writer import atomic_directory

ROWS = {"validation": 300, "test": 1000}
"""Most questions of a data set."""
BYTES = {"validation": 100_000, "test": 400_000}
"""Most bytes of raw text."""
Content = str | Sequence[tuple[str, str]]


def made_texts(configuration: Configuration, data: str | Path | None, folder: Path) -> Path:
    """The folder of held-out texts of a configuration, made from published data sets if it is not there yet.

    Args:
        configuration: Whose domains to make.
        data: Folder that holds ``gsm8k/{train,test}.jsonl``, ``mbpp/mbpp.jsonl`` and ``wikitext2/{valid,test}.txt``, those that are needed.
        folder: Where the folder ``texts`` goes.

    Raises:
        SourceError: There is no such folder, or a file is missing.
        LataError: A domain is none of these data sets.
    """
    unknown = [domain for domain in configuration.domains if domain not in READERS]
    if unknown:
        raise LataError(
            f"only {', '.join(READERS)} can be made from data sets, not {first_three(unknown)}; write the texts and give their folder with --texts"
        )
    target = folder / "texts"
    if target.is_dir():
        return target
    if data is None or not Path(data).is_dir():
        raise SourceError(
            f"held-out texts are needed for {', '.join(configuration.domains)}: give them with --texts, or a folder of data sets with --data or "
            f"LATA_DATA, got {None if data is None else str(data)!r}"
        )
    with atomic_directory(target) as written:
        write_texts(
            written, {split: {domain: READERS[domain](Path(data) / domain, split) for domain in configuration.domains} for split in SPLITS}
        )
    return target


def _gsm8k(folder: Path, split: Split) -> Content:
    # The end of the training questions, as there is no validation part.
    rows = _pairs(folder / ("train.jsonl" if split == "validation" else "test.jsonl"), "question", "answer")
    return rows[-ROWS[split] :] if split == "validation" else rows[: ROWS[split]]


def _mbpp(folder: Path, split: Split) -> Content:
    # Task numbers 11 to 510 are the published test part, 511 to 600 the validation part; rows are in their order from 1 on.
    rows = _pairs(folder / "mbpp.jsonl", "text", "code")
    return (rows[510:600] if split == "validation" else rows[10:510])[: ROWS[split]]


def _wikitext2(folder: Path, split: Split) -> Content:
    raw = _read(folder / ("valid.txt" if split == "validation" else "test.txt")).encode()
    return raw[: BYTES[split]].decode(errors="ignore")


READERS: dict[str, Callable[[Path, Split], Content]] = {"gsm8k": _gsm8k, "mbpp": _mbpp, "wikitext2": _wikitext2}


def _pairs(path: Path, prompt: str, answer: str) -> list[tuple[str, str]]:
    rows = list(json_rows(_read(path).split("\n"), path))
    odd = [f"line {number}" for number, row in enumerate(rows, start=1) if not {prompt, answer} <= set(row)]
    if odd:
        raise LataError(f"the rows of {path} must have {prompt!r} and {answer!r}; others are {first_three(odd)}")
    return [(str(row[prompt]).replace("\r\n", "\n"), str(row[answer]).replace("\r\n", "\n")) for row in rows]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
