"""A data module for causal language models over your own data: conversations, prompts with completions, or plain text.

Rows are padded on the right. Under causal attention no token attends to the padding and no label counts it, so batches have no attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lata_lightning.errors import LataError
from lata_lightning.rows.schema import columns_of, read_sample
from lata_lightning.rows.tables import divided, open_table
from lata_lightning.rows.tokens import Template, TokenRow, collate, conversation_row, packed, text_windows
from lata_lightning.training.data import shards_of
from lata_lightning.training.loading import load_tokenizer
from lata_lightning.training.streaming import StreamedBatches


class TextDataModule(LightningDataModule):
    """Rows of a data set on the hub or of JSONL, CSV or Parquet files, as tokens with labels.

    ================================================ ======================================================= ===========================
    columns                                          what a row is                                           what is learned
    ================================================ ======================================================= ===========================
    ``messages``                                     a conversation: a list of ``{"role": …, "content": …}`` every turn of the assistant
    ``prompt`` or ``question``, with ``completion``  a question and its answer                               the answer
    or ``answer``
    ``text``                                         a document; a long one is several rows                  all of it
    ================================================ ======================================================= ===========================

    Conversations and pairs are rendered by the tokenizer's chat template, BOS included. A document, and each row of a long one, begins with the special
    tokens that the tokenizer puts before a text, such as BOS; a document ends with the end token. The order of rows depends on the seed and the epoch
    only, never on the machine, and several processes divide one order; a resumed run continues with the rows that would have come next.
    """

    def __init__(
        self,
        data: str | list[str],
        validation: str | list[str] | None = None,
        validation_share: float = 0.0,
        columns: list[str] | None = None,
        template: Template = "chat",
        batch_size: int = 8,
        context_length: int = 512,
        too_long: Literal["refuse", "drop"] = "refuse",
        packing: bool = False,
        streaming: bool = False,
        batches_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        tokenizer: str | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_split: str = "train",
        seed: int = 0,
    ) -> None:
        """Store the settings; ``setup`` reads the data.

        Args:
            data: Files (paths or patterns), a directory, or the name of a data set on the hub.
            validation: Like ``data``, for the validation loop.
            validation_share: Without ``validation``: share of the rows of ``data`` to hold out. Their contents decide which, so they stay the same in
                every epoch and after a resume.
            columns: One column of conversations or of text, or two of prompts and completions; by default those of the table above. Needed for data
                with several of these forms.
            template: ``"plain"`` puts a completion directly after its prompt and the end token after both, for models without a chat template;
                BOS comes first, where the tokenizer adds one.
            batch_size: Rows per batch and process.
            context_length: Largest number of tokens of a row.
            too_long: Whether to refuse conversations and pairs with more tokens, or to drop them and print how many.
            packing: Pack several short rows into one of up to ``context_length`` tokens. They do not attend to each other; this needs a model of
                transformers that uses ``position_ids`` for it, as Llama, Gemma and Qwen do.
            streaming: Read rows as they are needed, for data that does not fit into memory. They are shuffled within ``shuffle_buffer``, and the data
                is repeated from the start when it ends.
            batches_per_epoch: With streaming, and only then: training batches of each process per epoch.
            shuffle_buffer: With streaming: size of the shuffle buffer in rows.
            tokenizer: Directory or hub id; by default that of the model in training.
            subset: Configuration of the data set on the hub.
            split: Split of ``data`` to train on.
            validation_split: Split of ``validation``.
            seed: Seed of the order of the rows, and of which are held out.

        Raises:
            LataError: A number is out of range, or settings contradict each other.
        """
        super().__init__()
        if min(batch_size, shuffle_buffer) < 1 or context_length < 2 or not 0 <= validation_share < 1:
            raise LataError(
                "batch_size and shuffle_buffer must be at least 1, context_length at least 2 and validation_share in [0, 1), "
                f"not {batch_size}, {shuffle_buffer}, {context_length} and {validation_share}"
            )
        if streaming != (batches_per_epoch is not None) or (batches_per_epoch is not None and batches_per_epoch < 1):
            raise LataError(
                f"batches_per_epoch must be given with streaming, where nothing else ends an epoch, and only then; it is {batches_per_epoch}"
            )
        if validation_share and (validation is not None or streaming):
            raise LataError("validation_share holds rows of data in memory out: it goes with neither validation nor streaming")
        if columns is not None and not 1 <= len(columns) <= 2:
            raise LataError(f"columns must be one column of conversations or text, or two of prompts and completions, got {len(columns)}")
        self.data, self.validation, self.validation_share = data, validation, validation_share
        self.columns, self.template, self.tokenizer_name = columns, template, tokenizer
        self.batch_size, self.context_length, self.too_long, self.packing = batch_size, context_length, too_long, packing
        self.streaming, self.batches_per_epoch, self.shuffle_buffer = streaming, batches_per_epoch, shuffle_buffer
        self.subset, self.split, self.validation_split, self.seed = subset, split, validation_split, seed
        self.tokenizer: Any = None
        self._stream: StreamedBatches | None = None
        self._train: list[TokenRow] = []
        self._validation: list[TokenRow] = []

    def prepare_data(self) -> None:
        """Download the data set from the hub, on one process."""
        if not self.streaming:
            open_table(self.data, self.split, self.subset)

    def setup(self, stage: str) -> None:
        """Read the data and turn it into tokens, once.

        Raises:
            LataError: The data cannot be read, lacks a column or a value, or does not fit the tokenizer, or a split is empty.
            SourceError: The tokenizer cannot be loaded.
        """
        if self.tokenizer is not None:
            return
        tokenizer = load_training_tokenizer(self.tokenizer_name or model_name(self.trainer))
        table = open_table(self.data, self.split, self.subset, streaming=self.streaming)
        if self.streaming:
            sample = next(iter(table), None)
            if sample is None:
                raise LataError(f"split {self.split!r} of {self.data!r} holds no row")
            columns = columns_of(sample, self.columns)
            self._stream = StreamedBatches(
                table,
                lambda row, number: self._rows(tokenizer, [row], columns, first=number),
                (lambda rows: packed(rows, self.context_length)) if self.packing else iter,
                self._collate,
                self.batch_size,
                self.batches_per_epoch or 0,
                self.shuffle_buffer,
                self.seed,
            )
        else:
            samples, columns = self._samples(table)
            train, validation = divided(samples, samples, self.validation_share, self.seed)
            self._train, self._validation = self._ready(tokenizer, train, columns), self._ready(tokenizer, validation, columns)
        if self.validation is not None:
            samples, columns = self._samples(open_table(self.validation, self.validation_split, self.subset))
            self._validation = self._ready(tokenizer, samples, columns)
        self.tokenizer = tokenizer

    def train_dataloader(self) -> Any:
        """Return the training rows, shuffled anew every epoch, and divided between processes."""
        self._check_set_up()
        shards = shards_of(self.trainer)
        if self._stream is not None:
            trainer = self.trainer
            self._stream.share(shards["num_replicas"], shards["rank"], lambda: 0 if trainer is None else trainer.current_epoch)
            return DataLoader(self._stream, batch_size=None)
        sampler: DistributedSampler[TokenRow] = DistributedSampler(_as_dataset(self._train), shuffle=True, seed=self.seed, **shards)
        return DataLoader(_as_dataset(self._train), self.batch_size, sampler=sampler, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        """Return the validation rows in order, or an empty list."""
        self._check_set_up()
        return DataLoader(_as_dataset(self._validation), self.batch_size, collate_fn=self._collate) if self._validation else []

    def _samples(self, table: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        columns = columns_of(table.column_names, self.columns)
        return list(table.select_columns(list(columns))), columns

    def _ready(self, tokenizer: Any, samples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[TokenRow]:
        rows = self._rows(tokenizer, samples, columns)
        if samples and not rows:
            raise LataError(f"none of {len(samples)} rows has at most {self.context_length} tokens; raise context_length")
        return list(packed(rows, self.context_length)) if self.packing else rows

    def _rows(self, tokenizer: Any, samples: Sequence[Mapping[str, Any]], columns: Sequence[str], first: int = 0) -> list[TokenRow]:
        """Turn samples into rows of tokens; ``too_long`` decides about longer ones."""
        rows: list[TokenRow] = []
        long: list[int] = []
        for number, values in enumerate(samples, first + 1):
            sample = read_sample(values, columns, where=f"row {number}")
            if sample.form == "text":
                windows = text_windows(tokenizer, sample.text, self.context_length, end=True)
                rows.extend(TokenRow(row, row.clone()) for row in map(torch.tensor, windows))
                continue
            row = conversation_row(tokenizer, sample, f"row {number}", self.template)
            if len(row.input_ids) > self.context_length:
                long.append(number)
            else:
                rows.append(row)
        if long and self.too_long == "refuse":
            raise LataError(
                f"rows may have at most {self.context_length} tokens; {len(long)} have more, the first is row {long[0]}. "
                "Raise context_length, or set too_long to 'drop'"
            )
        if long and not self.streaming:
            rank_zero_info(f"TextDataModule: left out {len(long)} of {len(samples)} rows with more than {self.context_length} tokens")
        return rows

    def _collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        # Padding is neither learned nor attended to, so any token will do where the tokenizer has no padding token.
        padding = self.tokenizer.pad_token_id
        return collate(rows, self.tokenizer.eos_token_id if padding is None else padding)

    def _check_set_up(self) -> None:
        if self.tokenizer is None:
            raise LataError("call setup() before asking for a loader; the Trainer does")


def load_training_tokenizer(name: str) -> Any:
    """Load a Hugging Face tokenizer that can end an answer, from a directory or hub id.

    Raises:
        SourceError: There is no tokenizer, or it cannot be loaded.
        LataError: The tokenizer has no end token.
    """
    tokenizer = load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise LataError(f"the tokenizer {name!r} has no end token, without which no answer would learn to end")
    return tokenizer


def model_name(trainer: Any) -> str:
    """Return the directory or hub id that the model in training was loaded from.

    Raises:
        LataError: There is no model, or its origin is not known.
    """
    module = getattr(trainer, "lightning_module", None)
    name = getattr(getattr(module, "model", None), "name_or_path", None)
    if not name:
        raise LataError("where the model in training comes from is not known; give the data module its directory or hub id")
    return str(name)


def _as_dataset(rows: list[TokenRow]) -> Any:
    return rows
