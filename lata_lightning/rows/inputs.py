"""Turning samples into the inputs of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.rows.schema import Sample
from lata_lightning.rows.tokens import Template, conversation_row, special_tokens


def tokenised(
    samples: Sequence[Sample], tokenizer: Any, *, max_tokens: int = 512, name: str = "the data", template: Template = "chat"
) -> tuple[list[Tensor], int]:
    """Turn samples into tokens.

    Args:
        samples: Conversations and pairs are put into the tokenizer's chat format; a text is what ``tokenizer(text)`` gives.
        tokenizer: Hugging Face tokenizer.
        max_tokens: Longer rows are cut; special tokens at the end of a text are kept.
        name: Where the samples come from, for messages; rows are counted from 1.
        template: ``plain`` puts the answer of a pair directly after its prompt.

    Returns:
        Token ids of every row, int64 of shape (tokens,), and how many rows were cut.

    Raises:
        LataError: See ``conversation_row``; or a row has no tokens, or ``max_tokens`` is not positive.
    """
    if max_tokens < 1:
        raise LataError(f"a row must have space for at least one token, not {max_tokens}")
    rows: list[Tensor] = []
    cut = 0
    for number, sample in enumerate(samples, start=1):
        where, after = f"row {number} of {name}", 0
        if sample.form == "text":
            ids = torch.tensor(tokenizer(sample.text, verbose=False)["input_ids"], dtype=torch.long)
            after = len(special_tokens(tokenizer)[1]) if len(ids) > max_tokens else 0
        else:
            ids = conversation_row(tokenizer, sample, where, template).input_ids
        if not len(ids):
            raise LataError(f"{where} has no tokens")
        if len(ids) > max_tokens:
            cut += 1
            ids = torch.cat([ids[: max(0, max_tokens - after)], ids[len(ids) - after :]])[:max_tokens]
        rows.append(ids)
    return rows, cut


def model_inputs(rows: Iterable[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
    """Return rows of tokens as batches, padded on the right: ``input_ids`` and ``attention_mask``, both of shape (rows, longest row)."""
    pending = iter(rows)
    batches = []
    while batch := list(islice(pending, batch_size)):
        # The mask hides the padding, so any token will do.
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
