"""Data modules for classifiers: a column of texts or images, and a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoImageProcessor

from lata_lightning.errors import LataError, SourceError, first_line, first_three
from lata_lightning.rows.schema import check_columns
from lata_lightning.rows.tables import divided, open_table
from lata_lightning.training.data import shards_of
from lata_lightning.training.loading import load_tokenizer
from lata_lightning.training.text_data import model_name


class LabelledDataModule(LightningDataModule):
    """Base of the data modules with labelled rows; a child class says what the rows are.

    Labels are whole numbers from 0, or words. The order of rows depends on the seed and the epoch only, and several processes divide one order.
    """

    def __init__(
        self,
        data: str | list[str],
        column: str,
        label_column: str = "label",
        label_names: list[str] | None = None,
        validation: str | list[str] | None = None,
        validation_share: float = 0.0,
        batch_size: int = 16,
        preprocessor: str | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_split: str = "train",
        seed: int = 0,
    ) -> None:
        """Store the settings; ``setup`` reads the data.

        Args:
            data: Files (paths or patterns), a directory, or the name of a data set on the hub.
            column: Column of the texts or images.
            label_column: Column of the labels.
            label_names: The words for the labels 0, 1, …; by default the class names of the model if all labels are among them, else the sorted
                words of ``data``. They become the class names in the model's config.
            validation: Like ``data``, for the validation loop.
            validation_share: Without ``validation``: share of the rows of ``data`` to hold out, chosen by their contents.
            batch_size: Rows per batch and process.
            preprocessor: Directory or hub id of the tokenizer or image processor; by default that of the model in training.
            subset: Configuration of the data set on the hub.
            split: Split of ``data`` to train on.
            validation_split: Split of ``validation``.
            seed: Seed of the order of the rows, and of which are held out.

        Raises:
            LataError: A number is out of range, or there are two sources of validation rows.
        """
        super().__init__()
        if batch_size < 1 or not 0 <= validation_share < 1:
            raise LataError(f"batch_size must be at least 1 and validation_share in [0, 1), not {batch_size} and {validation_share}")
        if validation_share and validation is not None:
            raise LataError("validation_share holds rows of data out: it does not go with validation")
        self.data, self.column, self.label_column, self.label_names = data, column, label_column, label_names
        self.validation, self.validation_share, self.batch_size = validation, validation_share, batch_size
        self.preprocessor_name, self.subset, self.split, self.validation_split, self.seed = (
            preprocessor,
            subset,
            split,
            validation_split,
            seed,
        )
        self.preprocessor: Any = None
        self._train: Any = None
        self._validation: Any = None

    def prepare_data(self) -> None:
        """Download the data set from the hub, on one process."""
        open_table(self.data, self.split, self.subset)

    def setup(self, stage: str) -> None:
        """Read the data, number the labels and split the rows, once.

        Raises:
            LataError: The data cannot be read, lacks a column or a value, has labels the model does not have, or leaves a split empty.
            SourceError: The tokenizer or image processor cannot be loaded.
        """
        if self.preprocessor is not None:
            return
        preprocessor = self._load(self.preprocessor_name or model_name(self.trainer))
        train = self._numbered(open_table(self.data, self.split, self.subset))
        if self.validation is not None:
            self._train, self._validation = train, self._numbered(open_table(self.validation, self.validation_split, self.subset))
        else:
            contents = (self._content(row) for row in train) if self.validation_share else [None] * len(train)
            train_rows, validation_rows = divided(range(len(train)), contents, self.validation_share, self.seed)
            self._train, self._validation = train.select(train_rows), train.select(validation_rows) if validation_rows else None
        self.preprocessor = preprocessor

    def train_dataloader(self) -> Any:
        """Return the training rows, shuffled anew every epoch, and divided between processes."""
        sampler: Any = DistributedSampler(self._ready(), shuffle=True, seed=self.seed, **shards_of(self.trainer))
        return DataLoader(self._train, self.batch_size, sampler=sampler, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        """Return the validation rows in order, or an empty list."""
        self._ready()
        return [] if self._validation is None else DataLoader(self._validation, self.batch_size, collate_fn=self._collate)

    def _load(self, name: str) -> Any:
        """Load the tokenizer or image processor."""
        raise NotImplementedError

    def _content(self, row: dict[str, Any]) -> Any:
        """Return the values that decide on which side of a split a row is."""
        raise NotImplementedError

    def _inputs(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Return the inputs of the model."""
        raise NotImplementedError

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {**self._inputs([row[self.column] for row in rows]), "labels": torch.tensor([row[self.label_column] for row in rows])}

    def _numbered(self, table: Any) -> Any:
        """Return the two columns, with the labels as numbers."""
        check_columns(table.column_names, [self.column, self.label_column])
        table = table.select_columns([self.column, self.label_column])
        for column in (self.column, self.label_column):
            empty = table.data.column(column).null_count
            if empty:
                raise LataError(f"column {column!r} must have a value in every row; {empty} of {len(table)} have none")
        labels = list(table[self.label_column])
        if all(isinstance(label, str) for label in labels):
            if self.label_names is None:
                self.label_names = self._names_for(set(labels))
            unknown = set(labels) - set(self.label_names)
            if unknown:
                raise LataError(f"there are labels that are not among the {len(self.label_names)} label_names, {first_three(unknown)}")
            numbers = [self.label_names.index(label) for label in labels]
            table = table.remove_columns(self.label_column).add_column(self.label_column, numbers)
        else:
            numbers = labels
        wrong = [label for label in numbers if not isinstance(label, int)]
        if wrong:
            raise LataError(f"labels must be whole numbers from 0, or words; {len(wrong)} are neither, the first is {wrong[0]!r}")
        config = self._model_config()
        classes = getattr(config, "num_labels", None)
        if min(numbers) < 0 or (classes is not None and max(numbers) >= classes):
            raise LataError(f"labels run from {min(numbers)} to {max(numbers)}, the model has {classes} classes; set its num_labels")
        if classes is not None and len(self.label_names or ()) > classes:
            raise LataError(
                f"label_names must be no more than the classes of the model; there are {len(self.label_names or ())} and {classes}"
            )
        if classes is not None and self.label_names is not None:
            # The config that is saved with the model, or with its head, names the classes.
            names = dict(enumerate([*self.label_names, *(f"LABEL_{number}" for number in range(len(self.label_names), classes))]))
            config.id2label, config.label2id = names, {name: number for number, name in names.items()}
        return table

    def _model_config(self) -> Any:
        """Return the config of the model in training; None if there is none."""
        return getattr(getattr(getattr(self.trainer, "lightning_module", None), "model", None), "config", None)

    def _names_for(self, labels: set[str]) -> list[str]:
        """Return the class names of the model if all labels are among them, else the labels in alphabetical order."""
        known = dict(getattr(self._model_config(), "id2label", None) or {})
        names = [str(known[number]) for number in sorted(known)]
        return names if labels <= set(names) else sorted(labels)

    def _ready(self) -> Any:
        if self._train is None:
            raise LataError("call setup() before asking for a loader; the Trainer does")
        return self._train


class LabelledTextDataModule(LabelledDataModule):
    """Texts with labels, truncated to the tokenizer's ``model_max_length``."""

    def __init__(self, data: str | list[str], column: str = "text", **settings: Any) -> None:
        super().__init__(data, column, **settings)

    def _load(self, name: str) -> Any:
        return load_tokenizer(name)

    def _content(self, row: dict[str, Any]) -> Any:
        return row

    def _inputs(self, values: Sequence[Any]) -> dict[str, Tensor]:
        return dict(self.preprocessor(list(values), padding=True, truncation=True, return_tensors="pt"))


class ImageDataModule(LabelledDataModule):
    """Images with labels: a directory with a folder for each class, or a data set with a column of images."""

    def __init__(self, data: str | list[str], column: str = "image", **settings: Any) -> None:
        super().__init__(data, column, **settings)

    def _load(self, name: str) -> Any:
        try:
            return AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"cannot load an image processor from {name!r}: {first_line(error)}") from error

    def _content(self, row: dict[str, Any]) -> Any:
        return row[self.column].tobytes()

    def _inputs(self, values: Sequence[Any]) -> dict[str, Tensor]:
        return dict(self.preprocessor([image.convert("RGB") for image in values], return_tensors="pt"))
