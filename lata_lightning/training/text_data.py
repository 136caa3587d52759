"""A data module for causal language models over one's own data: conversations, prompts with completions, or plain text.

Rows are padded on the right. Under causal attention no real token sees the padding and no label counts it, so batches
carry no attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer

from lata_lightning.errors import LataError, SourceError, first_line, first_three
from lata_lightning.training.data import shards_of
from lata_lightning.training.rows import Row, collate, conversation_pieces, packed, row_of
from lata_lightning.training.streaming import StreamedBatches
from lata_lightning.training.tables import check_columns, divided, open_table

# Looked for in this order.
KNOWN_COLUMNS = (("messages",), ("prompt", "completion"), ("text",))


class TextDataModule(LightningDataModule):
    """Rows of a hub data set or of JSONL, CSV or Parquet files, as tokens with labels.

    ========================== ======================================================= ===========================
    columns                    what a row is                                           what is learned
    ========================== ======================================================= ===========================
    ``messages``               a conversation: a list of ``{"role": …, "content": …}`` every turn of the assistant
    ``prompt``, ``completion`` a question and its answer                               the answer
    ``text``                   a document; a long one is several rows                  all of it
    ========================== ======================================================= ===========================

    Conversations and pairs take the form the tokenizer's chat template gives them. The order of rows depends on the seed and the epoch only, never
    on the machine, and several processes share one order out; a resumed run goes on with the rows that would have come.
    """

    def __init__(
        self,
        data: str | list[str],
        validation: str | list[str] | None = None,
        validation_share: float = 0.0,
        columns: list[str] | None = None,
        template: Literal["chat", "plain"] = "chat",
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
        """Keep the settings; data is read in ``setup``.

        Args:
            data: Files (paths or patterns), a directory, or the name of a data set on the hub.
            validation: The same for the validation loop.
            validation_share: Without ``validation``: share of the rows of ``data`` to hold out. Which ones, their contents decide, so that they stay
                the same in every epoch and after a resume.
            columns: One column of conversations or of text, or two of prompts and completions; by default ``messages``, else ``prompt`` and
                ``completion``, else ``text``.
            template: ``"plain"`` puts a completion straight after its prompt and the end token after both, for models without a chat template.
            batch_size: Rows a batch, of each process.
            context_length: Most tokens of a row.
            too_long: What to do with conversations and pairs of more tokens: refuse the data, or leave these rows out and say how many.
            packing: Fill rows with several short ones up to ``context_length``. None sees another one; needs a model of transformers that heeds
                ``position_ids``, as Llama, Gemma and Qwen do.
            streaming: Read rows as they are needed; for data that does not fit into memory. They are shuffled within ``shuffle_buffer``, and read
                again from the start when they are used up.
            batches_per_epoch: With streaming, and only then: training batches an epoch, of each process.
            shuffle_buffer: With streaming: rows to shuffle among each other.
            tokenizer: Directory or hub id; by default that of the model in training.
            subset: Configuration of the data set on the hub.
            split: Split of ``data`` to train on.
            validation_split: Split of ``validation``.
            seed: Order of the rows, and which are held out.

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
        self._train: list[Row] = []
        self._validation: list[Row] = []

    def prepare_data(self) -> None:
        """Fetches what lies on the hub, on one process."""
        if not self.streaming:
            open_table(self.data, self.split, self.subset)

    def setup(self, stage: str) -> None:
        """Reads the data and turns it into tokens, once.

        Raises:
            LataError: The data cannot be read, lacks a column or a value, or does not fit the tokenizer; a split is empty.
            SourceError: The tokenizer cannot be loaded.
        """
        if self.tokenizer is not None:
            return
        tokenizer = load_tokenizer(self.tokenizer_name or model_name(self.trainer))
        table = open_table(self.data, self.split, self.subset, streaming=self.streaming)
        if self.streaming:
            sample = next(iter(table), None)
            if sample is None:
                raise LataError(f"split {self.split!r} of {self.data!r} holds no row")
            columns = self._columns_of(list(sample))
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
            train, held = divided(samples, samples, self.validation_share, self.seed)
            self._train, self._validation = self._ready(tokenizer, train, columns), self._ready(tokenizer, held, columns)
        if self.validation is not None:
            samples, columns = self._samples(open_table(self.validation, self.validation_split, self.subset))
            self._validation = self._ready(tokenizer, samples, columns)
        self.tokenizer = tokenizer

    def train_dataloader(self) -> Any:
        """Shuffled anew every epoch, each process its share; the epoch comes from the trainer."""
        self._check_set_up()
        shards = shards_of(self.trainer)
        if self._stream is not None:
            trainer = self.trainer
            self._stream.share(shards["num_replicas"], shards["rank"], lambda: 0 if trainer is None else trainer.current_epoch)
            return DataLoader(self._stream, batch_size=None)
        sampler: DistributedSampler[Row] = DistributedSampler(_as_dataset(self._train), shuffle=True, seed=self.seed, **shards)
        return DataLoader(_as_dataset(self._train), self.batch_size, sampler=sampler, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        """The rows held out or given for validation, in order, or an empty list."""
        self._check_set_up()
        return DataLoader(_as_dataset(self._validation), self.batch_size, collate_fn=self._collate) if self._validation else []

    def _samples(self, table: Any) -> tuple[list[dict[str, Any]], list[str]]:
        columns = self._columns_of(table.column_names)
        return list(table.select_columns(columns)), columns

    def _columns_of(self, held: Sequence[str]) -> list[str]:
        if self.columns is not None:
            check_columns(held, self.columns)
            return self.columns
        for columns in KNOWN_COLUMNS:
            if set(columns) <= set(held):
                return list(columns)
        raise LataError(
            f"the data has neither 'messages', nor 'prompt' and 'completion', nor 'text'; name its columns, they are {first_three(held)}"
        )

    def _ready(self, tokenizer: Any, samples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Row]:
        rows = self._rows(tokenizer, samples, columns)
        if samples and not rows:
            raise LataError(f"none of {len(samples)} rows has at most {self.context_length} tokens; raise context_length")
        return list(packed(rows, self.context_length)) if self.packing else rows

    def _rows(self, tokenizer: Any, samples: Sequence[Mapping[str, Any]], columns: Sequence[str], first: int = 0) -> list[Row]:
        """Samples as rows of tokens; the rules of ``too_long`` are kept."""
        rows: list[Row] = []
        long: list[int] = []
        for number, sample in enumerate(samples, first):
            values = [sample.get(column) for column in columns]
            missing = [column for column, value in zip(columns, values, strict=True) if value is None or value in ("", [])]
            if missing:
                raise LataError(f"row {number} has nothing in column {missing[0]!r}; every row must have a value there")
            found = self._text(tokenizer, values, number)
            if isinstance(found, str):
                tokens = torch.tensor([*tokenizer(found, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id])
                # The end token alone would be a row that predicts nothing.
                rows.extend(Row(part, part.clone()) for part in torch.split(tokens, self.context_length) if len(part) > 1)
                continue
            row = row_of(tokenizer, found)
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

    def _text(self, tokenizer: Any, values: Sequence[Any], number: int) -> str | list[tuple[str, bool]]:
        """A document as it is, everything else in pieces that are learned or not."""
        wrong = [type(value).__name__ for value in values if not isinstance(value, str)]
        if len(values) == 1 and not wrong:
            return str(values[0])
        if len(values) == 2 and wrong:
            raise LataError(f"prompts and completions must be text, in row {number} there is a {wrong[0]}")
        if len(values) == 2 and self.template == "plain":
            return [(values[0], False), (values[1] + tokenizer.eos_token, True)]
        if not getattr(tokenizer, "chat_template", None):
            raise LataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: give one that has, or pairs with template 'plain', or a column of text"
            )
        messages = values[0] if len(values) == 1 else [{"role": "user", "content": values[0]}, {"role": "assistant", "content": values[1]}]
        if not isinstance(messages, list) or not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages):
            raise LataError(f"a conversation must be a list of turns with 'role' and 'content'; row {number} is none")
        pieces = conversation_pieces(tokenizer, messages)
        if pieces is None:
            raise LataError(
                f"the chat template renders the conversation in row {number} differently once it goes on, so that what to learn is not known; "
                "give one question and answer a row"
            )
        return pieces

    def _collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        # Padding is never learned nor seen, so where the tokenizer names none any token will do.
        padding = self.tokenizer.pad_token_id
        return collate(rows, self.tokenizer.eos_token_id if padding is None else padding)

    def _check_set_up(self) -> None:
        if self.tokenizer is None:
            raise LataError("call setup() before asking for a loader; the Trainer does")


def load_tokenizer(name: str) -> Any:
    """Hugging Face tokenizer from a directory or hub id.

    Raises:
        SourceError: There is none.
        LataError: It has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise LataError(f"the tokenizer {name!r} has no end token, without which no answer would learn to end")
    return tokenizer


def model_name(trainer: Any) -> str:
    """Directory or hub id the model in training was loaded from.

    Raises:
        LataError: There is no model, or it is not known where it comes from.
    """
    module = getattr(trainer, "lightning_module", None)
    name = getattr(getattr(module, "model", None), "name_or_path", None)
    if not name:
        raise LataError("where the model in training comes from is not known; give the data module its directory or hub id")
    return str(name)


def _as_dataset(rows: list[Row]) -> Any:
    return rows
