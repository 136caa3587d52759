"""A Lightning module for causal language models: what `lata fit`, the recipes and the quickstart train with."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lata_lightning.errors import LataError, SourceError


class CausalLMModule(LightningModule):
    """Next-token training of a Hugging Face causal language model.

    The optimizer is AdamW; matrices are decayed, norms and biases (everything of one dimension) are not. The learning
    rate rises linearly over the warm-up steps and then falls along half a cosine to ``final_learning_rate_share`` of
    its peak at the end of training.

    Batches are dictionaries with ``input_ids`` and ``labels`` of shape (rows, tokens), and ``attention_mask`` where the
    model needs one. The loss is the mean negative log-likelihood, in nats, of the tokens whose label is not -100.

    | logged key | when | what |
    |---|---|---|
    | ``train_loss`` | every training step, and the epoch's mean as ``train_loss_epoch`` | loss of the batch |
    | ``val_loss`` | every validation epoch | mean loss over the validation batches, weighted by their labels |

    Attributes:
        model: The Hugging Face model, in training mode (``from_pretrained`` returns evaluation mode and Lightning would
            keep it).
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        final_learning_rate_share: float = 0.1,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        """Load the model and keep the optimizer's settings.

        Args:
            model: Hugging Face directory, hub id, or a model already in memory, which is trained in place.
            learning_rate: Peak learning rate.
            weight_decay: Decay of parameters of two or more dimensions.
            betas: AdamW's decay rates of the first and second moment.
            warmup_steps: Optimizer steps of linear warm-up.
            final_learning_rate_share: Learning rate at the last step, as a share of the peak.
            dtype: Precision a directory or hub id is loaded in; a model in memory keeps its own. Task vectors are the
                better the higher it is.

        Raises:
            LataError: A setting is out of range.
            SourceError: The directory or hub id cannot be loaded as a causal language model.
        """
        super().__init__()
        if learning_rate < 0 or weight_decay < 0 or warmup_steps < 0:
            raise LataError(
                f"learning_rate, weight_decay and warmup_steps must not be negative, not {learning_rate}, {weight_decay} and {warmup_steps}"
            )
        if not 0 <= final_learning_rate_share <= 1:
            raise LataError(f"final_learning_rate_share must lie between 0 and 1, not {final_learning_rate_share}")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.model: Any = load_causal_lm(model, dtype) if isinstance(model, str) else model
        self.model.train()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.final_learning_rate_share = final_learning_rate_share

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        """Output of the Hugging Face model; its ``loss`` is None without labels."""
        return self.model(input_ids=input_ids, labels=labels, attention_mask=attention_mask, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=_predicted(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss; every label weighs the same, whatever the batches' sizes."""
        self.log("val_loss", self(**batch).loss, prog_bar=True, sync_dist=True, batch_size=_predicted(batch))

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, and its schedule by optimizer step."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [parameter for parameter in trainable if parameter.ndim >= 2],
                "weight_decay": self.weight_decay,
            },
            {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, steps, self.warmup_steps, self.final_learning_rate_share)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Learning rate as a share of its peak: a linear rise, then half a cosine.

    Args:
        step: Optimizer steps already taken.
        steps: Optimizer steps of the whole training.
        warmup_steps: Steps of the rise; step 0 has 1 / (warmup_steps + 1) of the peak, so that no step is wasted.
        final_share: Value at the end and after it.

    Returns:
        Dimensionless, in (0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


def load_causal_lm(source: str, dtype: str = "float32") -> Any:
    """Hugging Face causal language model from a directory or hub id, in evaluation mode.

    Args:
        source: Directory or hub id.
        dtype: Name of the torch floating type to hold the weights in.

    Raises:
        SourceError: It cannot be loaded; the message carries the reason.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load {source!r} as a causal language model: {error}") from error


def _predicted(batch: dict[str, Tensor]) -> int:
    # The first token of a row is never predicted.
    return int((batch["labels"][:, 1:] != -100).sum())
