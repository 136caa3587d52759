"""FSDP2 under torchrun, on two processes, with GPUs or without: torchrun --nproc-per-node 2 examples/fsdp2.py [OUTPUT]"""

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lata_lightning import LATACallback
from lata_lightning.quickstart.experts import BASE, INSTRUCT
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import TextDataModule

ROWS = Path(__file__).parent.parent / "recipes" / "data" / "math.jsonl"


class Sharded(CausalLMModule):
    """What CausalLMModule does by itself, spelled out for modules of one's own: shard every block, then the rest."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def main(output: Path) -> None:
    pl.seed_everything(0, verbose=False)
    callback = LATACallback((str(BASE), str(INSTRUCT)), output_dir=output)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=10, devices=2, strategy=strategy, logger=False, enable_checkpointing=False, callbacks=[callback]
    )
    trainer.fit(Sharded(str(INSTRUCT), learning_rate=1e-3), datamodule=TextDataModule(str(ROWS), context_length=64))
    # Every process measured its own shards; only sums crossed between them, and each knows the result.
    print(f"process {trainer.global_rank}: alignment {trainer.callback_metrics['lata/alignment']:.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "fsdp2-run"))
