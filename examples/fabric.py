"""A loop of Lightning Fabric, on one process or several, sharded or not: python examples/fabric.py [OUTPUT [DEVICES [STRATEGY]]]"""

import sys

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning import TaskVectorMonitor
from lata_lightning.quickstart.corpus import replay_text
from lata_lightning.quickstart.experts import BASE, INSTRUCT


def shard(model: torch.nn.Module, mesh: torch.distributed.DeviceMesh) -> torch.nn.Module:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def train(fabric: Fabric, output: str) -> None:
    fabric.seed_everything(0, verbose=False)
    tokens = AutoTokenizer.from_pretrained(INSTRUCT)(replay_text()[:32_000], verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 128 * 128]).view(-1, 128)
    batches = fabric.setup_dataloaders(torch.utils.data.DataLoader(windows[:64], batch_size=4))
    model = AutoModelForCausalLM.from_pretrained(INSTRUCT).train()
    # Fabric shards a model before it makes the optimizer, as the optimizer must see the shards.
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-4))
    # The model is on its device, cast and sharded by now. Every process makes a monitor and calls its methods.
    monitor = TaskVectorMonitor(model, (str(BASE), str(INSTRUCT)))
    for step, batch in enumerate(batches, 1):
        fabric.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            alignment = monitor.measure(step)
            print(f"process {fabric.global_rank}, step {step}: least aligned {min(alignment.values.values()):.6f}", flush=True)
    monitor.save(f"{output}/task_vector")
    monitor.save_history(f"{output}/history.jsonl")


if __name__ == "__main__":
    folder, devices, name = (sys.argv[1:] + ["fabric-run", "1", "auto"][len(sys.argv) - 1 :])[:3]
    strategy = ModelParallelStrategy(shard, data_parallel_size=int(devices), tensor_parallel_size=1) if name == "fsdp2" else name
    fabric = Fabric(accelerator="cpu", devices=int(devices), strategy=strategy)
    fabric.launch(train, folder)
