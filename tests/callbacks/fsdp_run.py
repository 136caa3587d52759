"""A fit under FSDP2 on two processes, started by a test: python fsdp_run.py DIRECTORY OUTPUT EPOCHS [CHECKPOINT|none] [PROVIDER]"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Module, batches, trainer
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback


class Sharded(Module):
    """Weights are loaded whole and sharded block by block; two processes share every tensor, some of them unevenly."""

    def __init__(self, start):
        super().__init__(LlamaForCausalLM.from_pretrained(start).train())

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    directory, output, epochs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    resume = sys.argv[4] if len(sys.argv) > 4 and sys.argv[4] != "none" else None
    module = Sharded(directory / "instruct")
    provider = sys.argv[5] if len(sys.argv) > 5 else "auto"
    callback = LATACallback(directory / "instruction", output_dir=output / "lata", every_n_train_steps=3, base_weights=provider)
    checkpoint = ModelCheckpoint(output / "kept", monitor="lata/alignment_min", mode="max", save_top_k=-1, filename="{epoch}")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    run = trainer(output, callback, checkpoint, strategy=strategy, devices=2, enable_checkpointing=True, max_epochs=epochs)
    run.fit(module, batches(8), batches(2), ckpt_path=resume)
    (output / f"rank{run.global_rank}").write_text(repr((run.callback_metrics["lata/alignment"].item(), callback.alignment.values)))
    full = {name: parameter.full_tensor() for name, parameter in module.model.named_parameters()}
    if run.is_global_zero:
        torch.save({"state_dict": full}, output / "tuned.ckpt")
