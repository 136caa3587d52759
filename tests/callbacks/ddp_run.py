"""A fit under DDP on two processes, started by a test: python ddp_run.py MODELS OUTPUT PROVIDER

With spilled start weights it breaks off after an epoch, as by a full queue.
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Module, batches, leave_together, trainer
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback


class Break(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyError("broken off")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, output, provider = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct"))
    other = {"other": models / "other"} if (models / "other").exists() else None
    callback = LATACallback(
        models / "instruction", output_dir=output / "lata", every_n_train_steps=2, base_weights=provider, compare_with=other
    )
    # A monitored value that is missing on one rank, or differs between ranks, would leave the other waiting here.
    checkpoint = ModelCheckpoint(output / "kept", monitor="lata/alignment_min", mode="max", save_last=True)
    breaking = [Break()] if provider == "spill" else []
    run = trainer(output, callback, checkpoint, *breaking, strategy="ddp", devices=2, enable_checkpointing=True)
    run.fit(module, batches(8))
    (output / f"rank{run.global_rank}").write_text(repr((run.callback_metrics["lata/alignment"].item(), callback.alignment.values)))
    if run.is_global_zero:
        module.model.save_pretrained(output / "tuned")
    leave_together()
