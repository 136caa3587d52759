"""A fit under FSDP2 on two processes, started by a test, which gives the options as JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Module, batches, leave_together, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback


class Sharded(Module):
    """Weights are loaded whole and sharded block by block; two processes share every tensor, some of them unevenly."""

    def __init__(self, start, replicated):
        super().__init__(LlamaForCausalLM.from_pretrained(start).train())
        self.replicated = replicated

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        if self.replicated:
            # Two replicas of one shard each: every process holds everything, and it must be counted once.
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = {
        "epochs": 2,
        "resume": None,
        "provider": "auto",
        "replicated": False,
        "distributed": False,
        "meshes": 1,
        "callback": True,
        **json.loads(sys.argv[1]),
    }
    models, output = Path(options["models"]), Path(options["output"])
    module = Sharded(models / "instruct", options["replicated"])
    callbacks = []
    if options["callback"]:
        callback = LATACallback(models / "instruction", output_dir=output / "lata", every_n_train_steps=3, base_weights=options["provider"])
        callbacks = [
            callback,
            ModelCheckpoint(output / "kept", monitor="lata/alignment_min", mode="max", save_top_k=-1, filename="{epoch}"),
        ]
    # With two meshes every process has a mesh of its own, as under ModelParallelStrategy() without arguments.
    sizes = {"data_parallel_size": 2 // options["meshes"], "tensor_parallel_size": options["meshes"]}
    strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=options["distributed"])
    run = trainer(output, *callbacks, strategy=strategy, devices=2, enable_checkpointing=bool(callbacks), max_epochs=options["epochs"])
    run.fit(module, batches(8), batches(2), ckpt_path=options["resume"])
    if callbacks:
        (output / f"rank{run.global_rank}").write_text(repr((run.callback_metrics["lata/alignment"].item(), callback.alignment.values)))
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    full = {name: parameter.full_tensor() for name, parameter in module.model.named_parameters()}
    if run.is_global_zero:
        torch.save({"state_dict": full}, output / "tuned.ckpt")
    leave_together()
