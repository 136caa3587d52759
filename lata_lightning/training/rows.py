"""Rows of tokens, and the order in which batches are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lata_lightning.errors import LataError, first_three

IGNORED = -100


class Row(NamedTuple):
    """One training sequence: token ids, and labels that are -100 where nothing is learned; both of shape (tokens,)."""

    input_ids: Tensor
    labels: Tensor


class MixtureBatchSampler(Sampler[list[int]]):
    """Batches of row numbers: chat rows drawn by group shares, and raw-text windows spread evenly between them.

    Every group is gone through in a shuffled order before a row of it comes again in the same epoch.
    """

    def __init__(
        self,
        groups: Sequence[range],
        shares: Sequence[float],
        windows: range,
        raw_share: float,
        rows_per_batch: int,
        windows_per_batch: int,
        batches: int,
        seed: int,
    ) -> None:
        self.groups = groups
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.windows = windows
        self.raw_share = raw_share
        self.rows_per_batch = rows_per_batch
        self.windows_per_batch = windows_per_batch
        self.batches = batches
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        orders = [_endless_shuffle(group, generator) for group in self.groups]
        for number in range(self.batches):
            # Raw batches are those at which the running total of raw text passes a whole number.
            if int((number + 1) * self.raw_share) > int(number * self.raw_share):
                starts = torch.randint(len(self.windows), (self.windows_per_batch,), generator=generator)
                yield [self.windows[start] for start in starts.tolist()]
            else:
                drawn = torch.multinomial(self.shares, self.rows_per_batch, replacement=True, generator=generator)
                yield [next(orders[group]) for group in drawn.tolist()]


class Rows(Dataset[Row]):
    """Chat rows first, then one row for every place at which a window of raw text can start."""

    def __init__(self, rows: list[Row], raw: Tensor, context_length: int) -> None:
        self.rows = rows
        self.raw = raw
        self.context_length = context_length
        self.windows = range(len(rows), len(rows) + (len(raw) - context_length + 1 if len(raw) else 0))

    def __len__(self) -> int:
        return len(self.rows) + len(self.windows)

    def __getitem__(self, index: int) -> Row:
        if index < len(self.rows):
            return self.rows[index]
        start = index - len(self.rows)
        window = self.raw[start : start + self.context_length].long()
        return Row(window, window)


def chat_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], longest: int) -> list[Row]:
    """Pairs as tokens in the tokenizer's chat format, learned from the answer's first token to the end of the turn.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        pairs: (prompt, answer) pairs.
        longest: Most tokens a row may have.

    Raises:
        LataError: A row is longer than that, or the template renders a question differently once it is answered.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    turns = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False)
        for prompt, answer in pairs
    ]
    changed = [pair[0] for pair, prompt, turn in zip(pairs, prompts, turns, strict=True) if not turn.startswith(prompt)]
    if changed:
        raise LataError(
            "the chat template must render a question the same way with and without its answer, "
            "so that the answer's tokens are known; "
            f"different for {first_three(changed)}"
        )
    rows = []
    for prompt, turn in zip(prompts, turns, strict=True):
        # Two pieces, so that no token straddles the border between prompt and answer, as in generation.
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(turn[len(prompt) :], add_special_tokens=False)["input_ids"]
        rows.append(Row(torch.tensor(head + tail), torch.tensor([IGNORED] * len(head) + tail)))
    too_long = [prompt for (prompt, _), row in zip(pairs, rows, strict=True) if len(row.input_ids) > longest]
    if too_long:
        raise LataError(f"rows may have at most {longest} tokens; too long are {first_three(too_long)}")
    return rows


def raw_tokens(tokenizer: Any, texts: Iterable[str], context_length: int) -> Tensor:
    """All texts as one line of tokens, the end token after each; shape (tokens,), empty without texts.

    Raises:
        LataError: There are texts, but together they do not fill one window of ``context_length`` tokens.
    """
    pieces = [
        # Not verbose: a document may be longer than the model's context, its windows are not.
        torch.tensor(
            [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id],
            dtype=torch.int32,
        )
        for text in texts
    ]
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    if pieces and len(tokens) < context_length:
        raise LataError(f"raw text must fill at least one window of {context_length} tokens, it has {len(tokens)}")
    return tokens


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of different lengths as one batch, padded on the right; padding has the label -100."""
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], True, pad_token_id),
        "labels": torch.nn.utils.rnn.pad_sequence([row.labels for row in rows], True, IGNORED),
    }


def _endless_shuffle(group: range, generator: torch.Generator) -> Iterator[int]:
    while True:
        for position in torch.randperm(len(group), generator=generator).tolist():
            yield group[position]
