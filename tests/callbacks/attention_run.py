"""A fit of the attention projections on two processes, started by a test, which gives the options as JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Module, batches, leave_together, trainer
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaForCausalLM

from lata_lightning import AttentionOnlyFinetuning, LATACallback


class Either(Module):
    """Built at once or in ``configure_model``, and sharded there if that is wanted; the optimizer decays all parameters."""

    def __init__(self, options):
        super().__init__(None)
        self.options = options
        if options["built"] == "init":
            self.build()

    def build(self):
        self.model = LlamaForCausalLM.from_pretrained(Path(self.options["models"]) / "instruct").train()

    def configure_model(self):
        if self.options["built"] == "configure_model":
            self.build()
        if self.options["strategy"] == "fsdp":
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = {"epochs": 2, "resume": None, **json.loads(sys.argv[1])}
    models, output = Path(options["models"]), Path(options["output"])
    module = Either(options)
    callbacks = [LATACallback(models / "instruction", output_dir=output / "lata", table=False), AttentionOnlyFinetuning()]
    if options["order"] == "before":
        callbacks.reverse()
    strategy = "ddp" if options["strategy"] == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    kept = ModelCheckpoint(output / "kept", save_top_k=-1, filename="{epoch}")
    run = trainer(output, *callbacks, kept, strategy=strategy, devices=2, enable_checkpointing=True, max_epochs=options["epochs"])
    run.fit(module, batches(8), ckpt_path=options["resume"])
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    whole = {
        name: (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
        for name, parameter in module.model.named_parameters()
    }
    if run.is_global_zero:
        torch.save({"state_dict": whole}, output / "tuned.ckpt")
    leave_together()
