"""A fit under DDP on two processes, started by a test: python ddp_run.py DIRECTORY"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Module, batches, trainer
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    module = Module(LlamaForCausalLM.from_pretrained(directory / "instruct"))
    callback = LATACallback(directory / "instruction", output_dir=directory / "lata", every_n_train_steps=2)
    # A monitored value that is missing on one rank, or differs between ranks, would leave the other waiting here.
    checkpoint = ModelCheckpoint(directory / "kept", monitor="lata/alignment_min", mode="max", save_last=True)
    run = trainer(directory, callback, checkpoint, strategy="ddp", devices=2, enable_checkpointing=True)
    run.fit(module, batches(8))
    (directory / f"rank{run.global_rank}").write_text(repr((run.callback_metrics["lata/alignment"].item(), callback.alignment.values)))
    if run.is_global_zero:
        module.model.save_pretrained(directory / "tuned")
