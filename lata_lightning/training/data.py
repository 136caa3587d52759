"""Data modules for causal language models: chat examples mixed with raw text, and raw text alone.

Rows are padded on the right. Under causal attention no real token sees the padding and no label counts it, so batches
carry no attention mask. The order of batches depends on the seed and the epoch only, never on the machine or on how
often a loader was started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lata_lightning.errors import LataError, first_three

IGNORED = -100


class Row(NamedTuple):
    """One training sequence: token ids, and labels that are -100 where nothing is learned; both of shape (tokens,)."""

    input_ids: Tensor
    labels: Tensor


class ChatDataModule(LightningDataModule):
    """Question-answer pairs in the tokenizer's chat format, mixed with raw text.

    A batch is either chat rows or raw text, about ``tokens_per_batch`` tokens of it, so that every step costs the same.
    Only the answer and what the chat template puts after it are learned; raw text is learned whole.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Mapping[str, Sequence[tuple[str, str]]],
        shares: Mapping[str, float] | None = None,
        raw_texts: Sequence[str] = (),
        raw_share: float = 0.0,
        validation: Sequence[tuple[str, str]] = (),
        batches_per_epoch: int = 100,
        tokens_per_batch: int = 2048,
        context_length: int = 128,
        seed: int = 0,
    ) -> None:
        """Keep the data; it is turned into tokens in ``setup``.

        Args:
            tokenizer: Hugging Face tokenizer with a chat template, a padding and an end token.
            examples: Named groups of (prompt, answer) pairs.
            shares: Share of chat rows of each group, any positive scale; equal shares unless given.
            raw_texts: Documents of raw text; they are joined with the end token and read in windows that start
                anywhere.
            raw_share: Share of batches, and so of tokens, that are raw text, in [0, 1).
            validation: Pairs for the validation loop; none, no validation.
            batches_per_epoch: Training batches an epoch.
            tokens_per_batch: Rows a batch are this divided by the longest chat row, or by ``context_length`` for raw
                text.
            context_length: Tokens of a raw row, and the most a chat row may have.
            seed: Order of rows and batches.

        Raises:
            LataError: A group is empty, ``shares`` names other groups or is not positive, or a number is out of range.
        """
        super().__init__()
        _check_sizes(batches_per_epoch, tokens_per_batch, context_length)
        if not examples or not all(examples.values()):
            empty = [name for name, pairs in examples.items() if not pairs]
            raise LataError(f"every group of examples needs at least one pair; empty are {first_three(empty)}")
        shares = dict.fromkeys(examples, 1.0) if shares is None else dict(shares)
        if shares.keys() != examples.keys():
            raise LataError(f"shares must name the groups of examples, on one side only are {first_three(shares.keys() ^ examples.keys())}")
        if min(shares.values()) <= 0:
            raise LataError(f"every share must be positive, not {min(shares.values())}; leave a group out instead")
        if not 0 <= raw_share < 1 or (raw_share > 0) != bool(raw_texts):
            raise LataError(
                "raw_share must lie in [0, 1), and be above 0 exactly if there are raw_texts; "
                f"it is {raw_share} with {len(raw_texts)} raw texts"
            )
        self.tokenizer = tokenizer
        self.examples = examples
        self.shares = shares
        self.raw_texts = raw_texts
        self.raw_share = raw_share
        self.validation = validation
        self.batches_per_epoch = batches_per_epoch
        self.tokens_per_batch = tokens_per_batch
        self.context_length = context_length
        self.seed = seed
        self._train: _Rows | None = None
        self._sampler: MixtureBatchSampler | None = None
        self._validation: _Rows | None = None

    def setup(self, stage: str) -> None:
        """Turns the pairs and the raw text into tokens, once."""
        if self._train is not None:
            return
        rows: list[Row] = []
        groups: list[range] = []
        for pairs in self.examples.values():
            groups.append(range(len(rows), len(rows) + len(pairs)))
            rows.extend(chat_rows(self.tokenizer, pairs, self.context_length))
        self._train = _Rows(rows, raw_tokens(self.tokenizer, self.raw_texts, self.context_length), self.context_length)
        longest = max(len(row.input_ids) for row in rows)
        self._sampler = MixtureBatchSampler(
            groups,
            list(self.shares.values()),
            self._train.windows,
            self.raw_share,
            rows_per_batch=max(1, self.tokens_per_batch // longest),
            windows_per_batch=max(1, self.tokens_per_batch // self.context_length),
            batches=self.batches_per_epoch,
            seed=self.seed,
        )
        if self.validation:
            self._validation = _Rows(chat_rows(self.tokenizer, self.validation, self.context_length), torch.empty(0), 0)

    def train_dataloader(self) -> Any:
        """``batches_per_epoch`` batches; the sampler learns the epoch from the trainer."""
        return DataLoader(_ready(self._train), batch_sampler=self._sampler, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        """The validation pairs in the order given, or an empty list."""
        if self._validation is None:
            return []
        rows = max(1, self.tokens_per_batch // max(len(row.input_ids) for row in self._validation.rows))
        return DataLoader(self._validation, batch_size=rows, collate_fn=self._collate)

    def _collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return collate(rows, self.tokenizer.pad_token_id)


class RawTextDataModule(LightningDataModule):
    """Raw text in windows of equal length that start anywhere, for pre-training and continued pre-training."""

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        validation_texts: Sequence[str] = (),
        batches_per_epoch: int = 100,
        tokens_per_batch: int = 2048,
        context_length: int = 128,
        seed: int = 0,
    ) -> None:
        """Keep the texts; they are turned into tokens in ``setup``.

        Args:
            tokenizer: Hugging Face tokenizer with an end token, which is put after every text.
            texts: Documents to train on.
            validation_texts: Documents for the validation loop, cut into windows that do not overlap; none, no
                validation.
            batches_per_epoch: Training batches an epoch.
            tokens_per_batch: Rows a batch are this divided by ``context_length``.
            context_length: Tokens of a row.
            seed: Where the windows start.

        Raises:
            LataError: There is no text, or a number is not positive.
        """
        super().__init__()
        _check_sizes(batches_per_epoch, tokens_per_batch, context_length)
        if not texts:
            raise LataError("texts must hold at least one document, it is empty")
        self.tokenizer = tokenizer
        self.texts = texts
        self.validation_texts = validation_texts
        self.batches_per_epoch = batches_per_epoch
        self.rows_per_batch = max(1, tokens_per_batch // context_length)
        self.context_length = context_length
        self.seed = seed
        self._train: _Rows | None = None
        self._validation: _Rows | None = None

    def setup(self, stage: str) -> None:
        """Turns the texts into tokens, once."""
        if self._train is not None:
            return
        self._train = _Rows([], raw_tokens(self.tokenizer, self.texts, self.context_length), self.context_length)
        if self.validation_texts:
            tokens = raw_tokens(self.tokenizer, self.validation_texts, self.context_length)
            blocks = tokens[: len(tokens) // self.context_length * self.context_length].view(-1, self.context_length)
            self._validation = _Rows([Row(block, block) for block in blocks], torch.empty(0), 0)

    def train_dataloader(self) -> Any:
        """``batches_per_epoch`` batches; the sampler learns the epoch from the trainer."""
        train = _ready(self._train)
        sampler = MixtureBatchSampler([], [], train.windows, 1.0, 0, self.rows_per_batch, batches=self.batches_per_epoch, seed=self.seed)
        return DataLoader(train, batch_sampler=sampler, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        """The validation windows in order, or an empty list."""
        if self._validation is None:
            return []
        return DataLoader(self._validation, batch_size=self.rows_per_batch, collate_fn=self._collate)

    def _collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return collate(rows, self.tokenizer.pad_token_id)


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


class _Rows(Dataset[Row]):
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


def _ready(rows: _Rows | None) -> _Rows:
    if rows is None:
        raise LataError("call setup() before asking for a loader; the Trainer does")
    return rows


def _check_sizes(batches_per_epoch: int, tokens_per_batch: int, context_length: int) -> None:
    if min(batches_per_epoch, tokens_per_batch) < 1 or context_length < 2:
        raise LataError(
            "batches_per_epoch and tokens_per_batch must be at least 1 and context_length at least 2, "
            f"not {batches_per_epoch}, {tokens_per_batch} and {context_length}"
        )
