"""Held-out texts for real checkpoints, made from data sets: those of a folder as they are published, or those a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lata_lightning.errors import LataError, SourceError, first_three
from lata_lightning.store.directories import json_rows
from lata_lightning.store.writer import atomic_directory
from study.real.published.configuration import Configuration, Source
from study.real.published.scoring import SPLITS, Split, write_texts

ROWS = {"validation": 300, "test": 1000}
"""Most questions of a data set."""
BYTES = {"validation": 100_000, "test": 400_000}
"""Most bytes of raw text."""
Content = str | Sequence[tuple[str, str]]


def made_texts(configuration: Configuration, data: str | Path | None, folder: Path) -> Path:
    """The folder of held-out texts of a configuration, made from published data sets if it is not there yet.

    Args:
        configuration: Whose domains to make.
        data: Folder that holds ``gsm8k/{train,test}.jsonl``, ``mbpp/mbpp.jsonl`` and ``wikitext2/{valid,test}.txt``, those that are needed. Without
            one, and for other domains, the data sets are read that the configuration names under ``texts``.
        folder: Where the folder ``texts`` goes.

    Raises:
        SourceError: There is no such folder, or a file is missing.
        LataError: A domain is none of these data sets and the configuration names none for it, or that cannot be read.
    """
    target = folder / "texts"
    if target.is_dir():
        return target
    if data is not None and not Path(data).is_dir():
        raise SourceError(f"{data} is no folder of data sets (--data, or LATA_DATA)")
    readers: dict[str, Callable[[Split], Content]] = {}
    for domain in configuration.domains:
        if data is not None and domain in READERS:
            readers[domain] = partial(READERS[domain], Path(data) / domain)
        elif domain in configuration.texts:
            readers[domain] = partial(_of_data_set, configuration.texts[domain])
    lacking = [domain for domain in configuration.domains if domain not in readers]
    if lacking:
        raise LataError(
            f"there are no held-out texts for {first_three(lacking)}: give their folder with --texts, a data set for each under 'texts' of the "
            f"configuration, or, for {', '.join(READERS)}, a folder of these data sets with --data or LATA_DATA"
        )
    with atomic_directory(target) as written:
        write_texts(written, {split: {domain: read(split) for domain, read in readers.items()} for split in SPLITS})
    return target


def _of_data_set(source: Source, split: Split) -> Content:
    from lata_lightning.rows.schema import check_columns
    from lata_lightning.rows.tables import open_table

    rows = open_table(source.dataset, getattr(source, split), source.subset)
    check_columns(rows.column_names, source.columns)
    if source.text is not None:
        return _at_most("".join(_line(row) for row in rows[source.text]), split)
    first = rows[: ROWS[split]]
    return [(_plain(prompt), _plain(answer)) for prompt, answer in zip(first[source.prompt], first[source.answer], strict=True)]


def _line(row: Any) -> str:
    text = str(row)
    return text if text.endswith("\n") else f"{text}\n"


def _at_most(raw: str, split: Split) -> str:
    return raw.encode()[: BYTES[split]].decode(errors="ignore")


def _plain(value: Any) -> str:
    return str(value).replace("\r\n", "\n")


def _gsm8k(folder: Path, split: Split) -> Content:
    # The end of the training questions, as there is no validation part.
    rows = _pairs(folder / ("train.jsonl" if split == "validation" else "test.jsonl"), "question", "answer")
    return rows[-ROWS[split] :] if split == "validation" else rows[: ROWS[split]]


def _mbpp(folder: Path, split: Split) -> Content:
    # Task numbers 11 to 510 are the published test part, 511 to 600 the validation part; rows are in their order from 1 on.
    rows = _pairs(folder / "mbpp.jsonl", "text", "code")
    return (rows[510:600] if split == "validation" else rows[10:510])[: ROWS[split]]


def _wikitext2(folder: Path, split: Split) -> Content:
    return _at_most(_read(folder / ("valid.txt" if split == "validation" else "test.txt")), split)


READERS: dict[str, Callable[[Path, Split], Content]] = {"gsm8k": _gsm8k, "mbpp": _mbpp, "wikitext2": _wikitext2}


def _pairs(path: Path, prompt: str, answer: str) -> list[tuple[str, str]]:
    rows = list(json_rows(_read(path).split("\n"), path))
    odd = [f"line {number}" for number, row in enumerate(rows, start=1) if not {prompt, answer} <= set(row)]
    if odd:
        raise LataError(f"the rows of {path} must have {prompt!r} and {answer!r}; others are {first_three(odd)}")
    return [(_plain(row[prompt]), _plain(row[answer])) for row in rows]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
