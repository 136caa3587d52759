"""A few samples of a task, from a file or a data set, as inputs of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError, SourceError
from lata_lightning.store.directories import json_rows
from lata_lightning.training.rows import chat_rows


def read_samples(data: str | Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a JSONL file, or of the ``train`` split of a data set.

    Args:
        data: A file with one JSON object per line, or what ``datasets.load_dataset`` takes: a hub id or a directory.
        count: How many; all if there are fewer.

    Raises:
        SourceError: There is no such file or data set.
        CorruptFileError: A line is no JSON object.
        LataError: ``count`` is not positive, or there is no row.
    """
    if count < 1:
        raise LataError(f"at least one sample is needed, not {count}")
    rows = list(islice(_lines(Path(data)) if Path(data).is_file() else _data_set(str(data)), count))
    if not rows:
        raise LataError(f"{data} holds no rows")
    return rows


def tokenised(rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_tokens: int = 512) -> tuple[list[Tensor], int]:
    """Rows as tokens.

    Args:
        rows: Each with ``prompt`` and ``answer`` (put into the chat format), with ``messages`` (a whole chat), or with ``text`` (taken as it is).
        tokenizer: Hugging Face tokenizer.
        max_tokens: A row is cut after so many.

    Returns:
        Token ids of every row, of shape (tokens,), and how many rows were cut.

    Raises:
        LataError: A row has none of these forms or no tokens, or the tokenizer has no chat template and one is needed.
    """
    if max_tokens < 1:
        raise LataError(f"a row must have room for at least one token, not {max_tokens}")
    found = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get("text"), str):
            ids = torch.tensor(tokenizer(row["text"], verbose=False)["input_ids"], dtype=torch.long)
        elif getattr(tokenizer, "chat_template", None) is None:
            raise LataError("the tokenizer has no chat template, so rows need a 'text'")
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
            # Cut below, together with the others.
            ids = chat_rows(tokenizer, [(row["prompt"], row["answer"])], longest=1 << 40)[0].input_ids
        elif isinstance(row.get("messages"), list):
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        else:
            raise LataError(
                f"row {number} must hold 'prompt' and 'answer', 'messages', or 'text'; it holds {', '.join(map(repr, sorted(row)))}"
            )
        if not len(ids):
            raise LataError(f"row {number} has no tokens")
        found.append(ids)
    return [ids[:max_tokens] for ids in found], sum(len(ids) > max_tokens for ids in found)


def model_inputs(rows: Iterable[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
    """Rows of tokens as batches, padded on the right: ``input_ids`` and ``attention_mask``, both of shape (rows, longest row)."""
    pending = iter(rows)
    batches = []
    while batch := list(islice(pending, batch_size)):
        # The mask keeps padding out of everything, so any token can stand there.
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from json_rows(lines, path)


def _data_set(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        # Streamed, as a few rows of a data set are wanted and not all of it.
        yield from datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise SourceError(f"{name} is neither a file nor a data set with a split 'train' ({str(error).partition(chr(10))[0]})") from error
