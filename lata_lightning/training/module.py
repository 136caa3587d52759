"""A Lightning module for causal language models: what `lata fit`, the recipes and the quickstart train with."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from lata_lightning.errors import LataError
from lata_lightning.training.loading import load_causal_lm, with_adapters
from lata_lightning.training.loss import is_wide, piecewise_loss
from lata_lightning.training.optimizing import Schedule, adamw, check_optimizing


class CausalLMModule(LightningModule):
    """Next-token training of a Hugging Face causal language model: of all its weights, or of LoRA adapters over them.

    The optimizer is AdamW; matrices are decayed, norms and biases (everything of one dimension) are not. The learning
    rate rises linearly over the warm-up steps and then falls to ``final_learning_rate_share`` of its peak at the end of
    training.

    Batches are dictionaries with ``input_ids`` and ``labels`` of shape (rows, tokens), and ``attention_mask`` or
    ``position_ids`` where there are any. The loss is the mean negative log-likelihood, in nats, of the tokens whose
    label is not -100. Under one device or DDP, logits that would take more than 64 MiB are computed a few positions at a time.

    ============== ======================================================= ===================================================
    logged key     when                                                    what
    ============== ======================================================= ===================================================
    ``train_loss`` every step; the epoch's mean as ``train_loss_epoch``    loss of the batch
    ``val_loss``   every validation epoch                                  mean loss over the batches, weighted by their labels
    ============== ======================================================= ===================================================

    Checkpoints of a training with adapters hold no frozen weight: the model they adapt is loaded from where it lies.
    Under ``ModelParallelStrategy`` (FSDP2) every block is sharded by itself.

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
        schedule: Schedule = "cosine",
        lora: dict[str, Any] | None = None,
        quantize: bool = False,
        gradient_checkpointing: bool = False,
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
            schedule: How the learning rate falls after the warm-up: along half a cosine, a line, or not at all.
            lora: Arguments of ``peft.LoraConfig``; the adapters are trained and the model is frozen. None trains the
                model itself.
            quantize: Hold the frozen model in four bits (QLoRA); needs ``lora`` and bitsandbytes.
            gradient_checkpointing: Compute the activations of a block again in the backward pass instead of keeping
                them.

        Raises:
            LataError: A setting is out of range, ``quantize`` without ``lora`` or bitsandbytes, or unknown arguments of
                ``lora``.
            SourceError: The directory or hub id cannot be loaded as a causal language model.
        """
        super().__init__()
        check_optimizing(learning_rate, weight_decay, warmup_steps, final_learning_rate_share)
        if quantize and (lora is None or not isinstance(model, str)):
            raise LataError("quantize holds a frozen model in four bits: it needs lora, and a model given by directory or hub id")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        found: Any = load_causal_lm(model, dtype, quantize=quantize) if isinstance(model, str) else model
        if gradient_checkpointing:
            # Newer releases of transformers rename it, older ones know it by the other name only.
            if hasattr(found, "activation_checkpointing_enable"):
                found.activation_checkpointing_enable()
            else:
                found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model: Any = found if lora is None else with_adapters(found, lora, quantized=quantize)
        self.model.train()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.final_learning_rate_share = final_learning_rate_share
        self.schedule = schedule
        self.adapted = lora is not None
        # A checkpoint of adapters alone is to load.
        self.strict_loading = lora is None

    def configure_model(self) -> None:
        """Under FSDP2, shard every block and then the rest; otherwise nothing."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        # The names transformers gives the classes that must stay on one device are those of the blocks.
        whole = set(getattr(self.model, "_no_split_modules", None) or ())
        for part in self.model.modules():
            if type(part).__name__ in whole:
                fully_shard(part, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Any:
        """Output of the Hugging Face model; its ``loss`` is None without labels."""
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, labels=labels, attention_mask=attention_mask, use_cache=False, **positions)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=_predicted(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss; every label weighs the same, whatever the batches' sizes."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=_predicted(batch))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # Where the weights are sharded, the head is whole only inside one run of the model.
        whole_weights = self._trainer is not None and isinstance(self._trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if whole_weights and is_wide(self.model, batch):
            return piecewise_loss(self.model, batch)
        loss: Tensor = self(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, and its schedule by optimizer step."""
        return adamw(
            self, self.learning_rate, self.weight_decay, self.betas, self.schedule, self.warmup_steps, self.final_learning_rate_share
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out where adapters are trained: they are on disk already."""
        if self.adapted:
            # Tied weights have a name at each place.
            frozen = {name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
            checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in frozen}


def _predicted(batch: dict[str, Tensor]) -> int:
    # The first token of a row is never predicted.
    return int((batch["labels"][:, 1:] != -100).sum())
