"""Lightning modules that fine-tune encoders, vision models and other models of transformers as classifiers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from lata_lightning.errors import LataError, SourceError, first_line
from lata_lightning.store.dtypes import FloatName
from lata_lightning.training.optimizing import Schedule, adamw, check_optimizing


class ClassificationModule(LightningModule):
    """Base of the modules that train a classifier of transformers; a child class says what the batches hold.

    Optimizer and schedule are those of ``CausalLMModule``. Batches are dictionaries with ``labels`` of shape (rows,), int64, and the inputs of the model.

    ================ ================================================================= =================================================================
    logged key       when                                                              what
    ================ ================================================================= =================================================================
    ``train_loss``   every training step, and the epoch's mean as ``train_loss_epoch`` mean cross-entropy of the batch, in nats
    ``val_loss``     every validation epoch                                            mean over the rows
    ``val_accuracy`` every validation epoch                                            share of rows classified correctly, in [0, 1], over all processes
    ================ ================================================================= =================================================================

    Attributes:
        model: The Hugging Face model, in training mode.
    """

    kind: ClassVar[str]
    auto: ClassVar[Any]

    def __init__(
        self,
        model: str | PreTrainedModel,
        num_labels: int | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        final_learning_rate_share: float = 0.0,
        dtype: FloatName = "float32",
        schedule: Schedule = "cosine",
    ) -> None:
        """Load the model and keep the optimizer's settings.

        Args:
            model: Hugging Face directory, hub id, or a model already in memory, which is trained in place.
            num_labels: Number of classes; None takes the stored number. A head that is not stored, or has another number of classes, starts at random
                values.
            learning_rate: Peak learning rate.
            weight_decay: Decay of parameters of two or more dimensions.
            betas: AdamW's decay rates of the first and second moment.
            warmup_steps: Optimizer steps of linear warm-up.
            final_learning_rate_share: Learning rate at the last step, as a share of the peak.
            dtype: Precision a directory or hub id is loaded in; a model in memory keeps its own.
            schedule: How the learning rate falls after the warm-up.

        Raises:
            LataError: A setting is out of range, or there are fewer than two classes.
            SourceError: The directory or hub id cannot be loaded as such a classifier.
        """
        super().__init__()
        check_optimizing(learning_rate, weight_decay, warmup_steps, final_learning_rate_share)
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.model: Any = self._load(model, num_labels, dtype) if isinstance(model, str) else model
        classes = int(self.model.config.num_labels)
        if classes < 2 or num_labels not in (None, classes):
            raise LataError(f"a classifier needs at least 2 classes, and a model in memory keeps its {classes}; num_labels is {num_labels}")
        self.model.train()
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.optimizing = (learning_rate, weight_decay, betas, schedule, warmup_steps, final_learning_rate_share)

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the Hugging Face model: ``logits`` of shape (rows, classes), and ``loss`` where there are labels."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        output = self(**batch)
        self.accuracy(output.logits.argmax(-1), batch["labels"])
        self.log("val_loss", output.loss, prog_bar=True, sync_dist=True, batch_size=len(batch["labels"]))
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable parameters, and its schedule by optimizer step."""
        return adamw(self, *self.optimizing)

    @classmethod
    def _load(cls, source: str, num_labels: int | None, dtype: str) -> Any:
        head = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        try:
            return cls.auto.from_pretrained(source, dtype=getattr(torch, dtype), **head)
        except (OSError, ValueError, RuntimeError) as error:
            raise SourceError(f"cannot load {source!r} as a classifier of {cls.kind}: {first_line(error)}") from error


class SequenceClassificationModule(ClassificationModule):
    """Train a text classifier; batches hold ``input_ids`` and ``attention_mask``, both of shape (rows, tokens)."""

    kind = "texts"
    auto = AutoModelForSequenceClassification


class ImageClassificationModule(ClassificationModule):
    """Train an image classifier; batches hold ``pixel_values`` of shape (rows, channels, height, width)."""

    kind = "images"
    auto = AutoModelForImageClassification
