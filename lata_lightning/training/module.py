"""The Lightning module for causal language models that `lata fit`, the recipes and the quickstart use."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from lata_lightning.errors import LataError
from lata_lightning.store.dtypes import FloatName
from lata_lightning.training.loading import load_causal_lm, with_adapters
from lata_lightning.training.loss import chunked_loss, is_wide
from lata_lightning.training.optimizing import Schedule, adamw, check_optimizing


class CausalLMModule(LightningModule):
    """Train a Hugging Face causal language model on next tokens: all its weights, or LoRA adapters.

    The optimizer is AdamW, with weight decay on matrices but not on norms and biases (everything of one dimension). The learning rate rises linearly over
    the warm-up steps and then falls to ``final_learning_rate_share`` of its peak at the end of training.

    Batches are dictionaries with ``input_ids`` and ``labels`` of shape (rows, tokens), and optionally ``attention_mask`` or ``position_ids``. The loss is
    the mean negative log-likelihood, in nats, of the tokens whose label is not -100. On one device and under DDP, logits that would take more than 64 MiB
    are computed a few positions at a time.

    ============== ======================================================= ===================================================
    logged key     when                                                    what
    ============== ======================================================= ===================================================
    ``train_loss`` every step; the epoch's mean as ``train_loss_epoch``    loss of the batch
    ``val_loss``   every validation epoch                                  mean loss over the batches, weighted by their labels
    ============== ======================================================= ===================================================

    With adapters, checkpoints leave out the frozen weights, which are loaded from ``model`` again. Under ``ModelParallelStrategy`` (FSDP2) every block is
    sharded separately.

    Attributes:
        model: The Hugging Face model, in training mode (``from_pretrained`` returns evaluation mode, which Lightning would keep).
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        final_learning_rate_share: float = 0.1,
        dtype: FloatName = "float32",
        schedule: Schedule = "cosine",
        lora: dict[str, Any] | None = None,
        quantize: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Load the model and store the optimizer's settings.

        Args:
            model: Hugging Face directory, hub id, or a model already in memory, which is trained in place.
            learning_rate: Peak learning rate.
            weight_decay: Decay of parameters of two or more dimensions.
            betas: AdamW's decay rates of the first and second moment.
            warmup_steps: Optimizer steps of linear warm-up.
            final_learning_rate_share: Learning rate at the last step, as a share of the peak.
            dtype: Precision in which a directory or hub id is loaded; a model in memory keeps its own. A higher precision gives a more exact task vector.
            schedule: How the learning rate falls after the warm-up: along half a cosine, a line, or not at all.
            lora: Arguments of ``peft.LoraConfig``; only the adapters are trained. None trains the model itself.
            quantize: Store the frozen model in four bits (QLoRA); needs ``lora`` and bitsandbytes.
            gradient_checkpointing: Compute the activations of a block again in the backward pass instead of storing them.

        Raises:
            LataError: A setting is out of range, ``quantize`` without ``lora`` or bitsandbytes, or unknown arguments in ``lora``.
            SourceError: The directory or hub id cannot be loaded as a causal language model.
        """
        super().__init__()
        check_optimizing(learning_rate, weight_decay, warmup_steps, final_learning_rate_share)
        if quantize and (lora is None or not isinstance(model, str)):
            raise LataError("quantize holds a frozen model in four bits: it needs lora, and a model given by directory or hub id")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        loaded: Any = load_causal_lm(model, dtype, quantize=quantize) if isinstance(model, str) else model
        if gradient_checkpointing:
            # Newer releases of transformers have the first method, older ones only the second.
            if hasattr(loaded, "activation_checkpointing_enable"):
                loaded.activation_checkpointing_enable()
            else:
                loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model: Any = loaded if lora is None else with_adapters(loaded, lora, quantized=quantize)
        self.model.train()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.final_learning_rate_share = final_learning_rate_share
        self.schedule = schedule
        self.adapted = lora is not None
        # A checkpoint that holds the adapters alone must load.
        self.strict_loading = lora is None

    def configure_model(self) -> None:
        """Shard every block and then the rest under FSDP2; otherwise do nothing."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        # The classes that transformers does not split over devices are those of the blocks.
        whole = set(getattr(self.model, "_no_split_modules", None) or ())
        for part in self.model.modules():
            if type(part).__name__ in whole:
                fully_shard(part, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Any:
        """Return the output of the Hugging Face model; its ``loss`` is None without labels."""
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, labels=labels, attention_mask=attention_mask, use_cache=False, **positions)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=_predicted(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss; every label has the same weight, whatever the sizes of the batches."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=_predicted(batch))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # Where the weights are sharded, the head is whole only during a forward pass of the model.
        whole_weights = self._trainer is not None and isinstance(self._trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if whole_weights and is_wide(self.model, batch):
            return chunked_loss(self.model, batch)
        loss: Tensor = self(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable parameters, and its schedule by optimizer step."""
        return adamw(
            self, self.learning_rate, self.weight_decay, self.betas, self.schedule, self.warmup_steps, self.final_learning_rate_share
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out when adapters are trained: they are on disk already."""
        if self.adapted:
            # Tied weights have one name for each module that uses them.
            frozen = {name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
            checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in frozen}


def _predicted(batch: dict[str, Tensor]) -> int:
    # The first token of a row is never predicted.
    return int((batch["labels"][:, 1:] != -100).sum())
