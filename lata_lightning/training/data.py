"""Data modules for causal language models: chat pairs mixed with raw text, or raw text alone.

Rows are padded on the right. Under causal attention no token attends to the padding and no label counts it, so batches have no attention mask. The
order of batches depends on the seed and the epoch only, never on the machine or on how often a loader was started; several processes divide one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lata_lightning.errors import LataError, first_three
from lata_lightning.rows.tokens import TokenRow, chat_rows, collate, raw_tokens
from lata_lightning.training.batches import Batches, MixtureBatchSampler, TokenRows


class ChatDataModule(LightningDataModule):
    """Question-answer pairs in the tokenizer's chat format, mixed with raw text.

    A batch holds either chat rows or raw text, about ``tokens_per_batch`` tokens, so that every step costs the same. The loss counts the answer and what
    the chat template puts after it; of raw text it counts every token.
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
        """Store the data; ``setup`` turns it into tokens.

        Args:
            tokenizer: Hugging Face tokenizer with a chat template, a padding and an end token.
            examples: Named groups of (prompt, answer) pairs.
            shares: Relative share of chat rows of each group, positive; by default equal.
            raw_texts: Documents of raw text, which are joined with the end token and read in windows that start at random positions.
            raw_share: Share of batches, and so of tokens, that are raw text, in [0, 1).
            validation: Pairs for the validation loop; without them there is no validation.
            batches_per_epoch: Training batches of each process per epoch.
            tokens_per_batch: The number of rows per batch is this divided by the longest chat row, or by ``context_length`` for raw text.
            context_length: Tokens of a raw row, and the largest number of tokens of a chat row.
            seed: Seed of the order of rows and batches.

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
        self._train: TokenRows | None = None
        self._groups: list[range] = []
        self._validation: TokenRows | None = None

    def setup(self, stage: str) -> None:
        """Turn the pairs and the raw text into tokens, once."""
        if self._train is not None:
            return
        rows: list[TokenRow] = []
        for pairs in self.examples.values():
            self._groups.append(range(len(rows), len(rows) + len(pairs)))
            rows.extend(chat_rows(self.tokenizer, pairs, self.context_length))
        self._train = TokenRows(rows, raw_tokens(self.tokenizer, self.raw_texts, self.context_length), self.context_length)
        if self.validation:
            self._validation = TokenRows(chat_rows(self.tokenizer, self.validation, self.context_length), torch.empty(0), 0)

    def train_dataloader(self) -> Any:
        """Return ``batches_per_epoch`` batches; the trainer tells the sampler the epoch."""
        train = _ready(self._train)
        sampler = MixtureBatchSampler(
            self._groups,
            list(self.shares.values()),
            train.windows,
            self.raw_share,
            rows_per_batch=max(1, self.tokens_per_batch // max(len(row.input_ids) for row in train.rows)),
            windows_per_batch=max(1, self.tokens_per_batch // self.context_length),
            batches=self.batches_per_epoch,
            seed=self.seed,
            **shards_of(self.trainer),
        )
        return DataLoader(Batches(train, self.tokenizer.pad_token_id), sampler=sampler, batch_size=None)

    def val_dataloader(self) -> Any:
        """Return the validation pairs in the given order, or an empty list."""
        if self._validation is None:
            return []
        rows = max(1, self.tokens_per_batch // max(len(row.input_ids) for row in self._validation.rows))
        return DataLoader(self._validation, batch_size=rows, collate_fn=self._collate)

    def _collate(self, rows: list[TokenRow]) -> dict[str, Tensor]:
        return collate(rows, self.tokenizer.pad_token_id)


class RawTextDataModule(LightningDataModule):
    """Raw text in windows of equal length that start at random positions, for pre-training and continued pre-training."""

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
        """Store the texts; ``setup`` turns them into tokens.

        Args:
            tokenizer: Hugging Face tokenizer with an end token, which is put after every text.
            texts: Documents to train on.
            validation_texts: Documents for the validation loop, cut into windows that do not overlap; without them there is no validation.
            batches_per_epoch: Training batches of each process per epoch.
            tokens_per_batch: The number of rows per batch is this divided by ``context_length``.
            context_length: Tokens of a row.
            seed: Seed of the positions at which the windows start.

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
        self._train: TokenRows | None = None
        self._validation: TokenRows | None = None

    def setup(self, stage: str) -> None:
        """Turn the texts into tokens, once."""
        if self._train is not None:
            return
        self._train = TokenRows([], raw_tokens(self.tokenizer, self.texts, self.context_length), self.context_length)
        if self.validation_texts:
            tokens = raw_tokens(self.tokenizer, self.validation_texts, self.context_length)
            blocks = tokens[: len(tokens) // self.context_length * self.context_length].view(-1, self.context_length)
            self._validation = TokenRows([TokenRow(block, block) for block in blocks], torch.empty(0), 0)

    def train_dataloader(self) -> Any:
        """Return ``batches_per_epoch`` batches; the trainer tells the sampler the epoch."""
        train = _ready(self._train)
        sampler = MixtureBatchSampler(
            [], [], train.windows, 1.0, 0, self.rows_per_batch, batches=self.batches_per_epoch, seed=self.seed, **shards_of(self.trainer)
        )
        return DataLoader(Batches(train, self.tokenizer.pad_token_id), sampler=sampler, batch_size=None)

    def val_dataloader(self) -> Any:
        """Return the validation windows in order, or an empty list."""
        if self._validation is None:
            return []
        return DataLoader(self._validation, batch_size=self.rows_per_batch, collate_fn=self._collate)

    def _collate(self, rows: list[TokenRow]) -> dict[str, Tensor]:
        return collate(rows, self.tokenizer.pad_token_id)


def shards_of(trainer: Any) -> dict[str, Any]:
    """Return ``num_replicas`` and ``rank`` of the processes that divide the data; one replica without a trainer."""
    shares = getattr(trainer, "distributed_sampler_kwargs", None)
    return dict(shares) if shares else {"num_replicas": 1, "rank": 0}


def _ready(rows: TokenRows | None) -> TokenRows:
    if rows is None:
        raise LataError("call setup() before asking for a loader; the Trainer does")
    return rows


def _check_sizes(batches_per_epoch: int, tokens_per_batch: int, context_length: int) -> None:
    if min(batches_per_epoch, tokens_per_batch) < 1 or context_length < 2:
        raise LataError(
            "batches_per_epoch and tokens_per_batch must be at least 1 and context_length at least 2, "
            f"not {batches_per_epoch}, {tokens_per_batch} and {context_length}"
        )
