"""A LightningModule around a tiny Llama, and a Trainer that writes nothing but what a test asks for."""

from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning import TaskVector

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What runs this small are warned of. Each entry is one warning; deprecations that a callback of ours would cause are none of them.
EXPECTED_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Lightning itself asks torch for the leaves of a tree under an older name.
        r".*isinstance\(treespec, LeafSpec\)",
        # transformers loads models in evaluation mode, in which they train as well: there is no dropout in them.
        r"Found \d+ module\(s\) in eval mode at the start of training",
        # An epoch of a test has a few batches, loaded by the process itself.
        r".*does not have many workers",
        r"The number of training batches .* is smaller than the logging interval",
        # Modules that are used with and without validation.
        r"You defined a `validation_step` but have no `val_dataloader`",
        # Runs that are resumed write where the first one wrote, from the middle of an epoch, with other callbacks or none to resume from.
        r"Checkpoint directory .* exists and is not empty",
        r"You're resuming from a checkpoint that ended before the epoch ended",
        r"Be aware that when using `ckpt_path`",
        r".*there is no last checkpoint available",
        r".*was called without a model\. The last model of the previous",
        r"The dirpath has changed from",
        # A checkpoint of an epoch without measurement.
        r".*could not find the monitored key",
        # Backbones that a test freezes twice.
        r"The provided params to be frozen already exist",
        # Half precision is asked for on a CPU.
        r".*AMP with fp16 is not supported on CPU",
        # torch.compile looks at the gradients of whatever it traces.
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        # peft asks a model of transformers for gradient checkpointing under an older name.
        r"`is_gradient_checkpointing` is deprecated:FutureWarning",
    )
]


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes}))


def shifted(model, seed, size=0.02):
    """A copy of the model with noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return copy


def make_models(directory, **changes):
    """Saves base, instruct and their instruction vector; gives the directory."""
    base = tiny_llama(**changes)
    base.save_pretrained(directory / "base")
    shifted(base, 1).save_pretrained(directory / "instruct")
    TaskVector.between(directory / "base", directory / "instruct", kind="instruction").save(directory / "instruction")
    return directory


class Module(pl.LightningModule):
    def __init__(self, model, learning_rate=0.05):
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def batches(count=6, size=2):
    tokens = torch.randint(3, 32, (count * size, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader(tokens, batch_size=size)


def trainer(directory, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=options.pop("devices", 1),
        **options,
    )


def leave_together():
    """End the process group at the end of a script: its threads must not outlive the interpreter, which then aborts."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
