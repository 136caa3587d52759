"""LATACallback on one GPU under each strategy: is every figure that of the CPU, and what does a measurement cost?

    python -m benchmarks.gpu [--hidden 2048] [--blocks 16] [--steps 20]
    python -m benchmarks.gpu --accelerator cpu --hidden 32 --blocks 2 --steps 4    # tries the script without a GPU

A Llama of random weights is trained for two epochs in bfloat16 mixed precision on one device: plain, with DDP, FSDP1, FSDP2, FSDP2 with LoRA, and QLoRA
where bitsandbytes is installed. After each fit the weights are fetched to the CPU, and task norm and alignment of every block are computed from them in
float64 with numpy. Meant to take less than eight minutes on a GPU with 24 GB. Writes benchmarks/results/gpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench import MIB, median, publish, table

WAYS = ("plain, copies in memory", "plain, start read from disk", "DDP", "FSDP1", "FSDP2", "FSDP2, LoRA", "QLoRA")


class Figures(NamedTuple):
    """What one fit gave.

    Attributes:
        step: Seconds of a training step.
        measurement: Seconds of a measurement.
        memory: Peak memory of the device in bytes; 0 on a CPU.
        difference: Largest relative difference of a figure from that of whole weights on the CPU.
    """

    step: float
    measurement: float
    memory: int
    difference: float


def models(directory: Path, hidden: int, blocks: int) -> None:
    """Write a base model of random weights, and an instruct model that differs from it by a small random amount."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3 + 1,
        num_hidden_layers=blocks,
        num_attention_heads=max(2, hidden // 128),
        vocab_size=4099,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.001
    model.save_pretrained(directory / "instruct")


def fit(directory: Path, way: str, options: argparse.Namespace) -> Figures:
    """Train in one way, and compare what was measured with whole weights."""
    import lightning.pytorch as pl
    import torch

    from lata_lightning import LATACallback
    from lata_lightning.training.module import CausalLMModule

    class Timed(LATACallback):
        spent: list[float] = []  # noqa: RUF012

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            _wait(options.accelerator)
            began = time.perf_counter()
            super().on_train_epoch_end(trainer, pl_module)
            _wait(options.accelerator)
            self.spent.append(time.perf_counter() - began)

    class Steps(pl.Callback):
        spent: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, *_: object) -> None:
            _wait(options.accelerator)
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: object) -> None:
            _wait(options.accelerator)
            self.spent.append(time.perf_counter() - self.began)

    class Whole(pl.Callback):
        weights: dict[str, Any] = {}  # noqa: RUF012

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.weights = _whole(trainer, pl_module)

    run = directory / way.replace(", ", "-").replace(" ", "-")
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} if "LoRA" in way else None
    callback = Timed(
        (str(directory / "base"), str(directory / "instruct")),
        output_dir=run,
        export=(),
        table=False,
        base_weights="memory" if "memory" in way else "auto",
    )
    timed, whole = Steps(), Whole()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=options.accelerator,
        devices=1,
        strategy=_strategy(way, options.accelerator),
        precision="bf16-mixed",
        callbacks=[timed, callback, whole],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    module = CausalLMModule(str(directory / "instruct"), learning_rate=1e-4, lora=lora, quantize=way == "QLoRA")
    tokens = torch.randint(0, 4099, (options.steps, 64), generator=torch.Generator().manual_seed(1))
    if options.accelerator == "gpu":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=1))
    memory = torch.cuda.max_memory_allocated() if options.accelerator == "gpu" else 0
    row = json.loads((run / "history.jsonl").read_text("utf-8").splitlines()[-1])
    return Figures(median(timed.spent[1:]), median(callback.spent), memory, difference(directory, whole.weights, row))


def _wait(accelerator: str) -> None:
    import torch

    if accelerator == "gpu":
        torch.cuda.synchronize()


def _strategy(way: str, accelerator: str) -> Any:
    """The strategy of a way; on a CPU, FSDP1 as torch runs it there."""
    import functools

    import torch
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class OnCPU(FSDPStrategy):
        def _setup_model(self, model: torch.nn.Module) -> FullyShardedDataParallel:
            return FullyShardedDataParallel(
                model, mixed_precision=self.mixed_precision_config, device_id=torch.device("cpu"), **self.kwargs
            )

    if way == "FSDP1":
        kind = OnCPU if accelerator == "cpu" else FSDPStrategy
        return kind(auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}))
    if "FSDP2" in way:
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return "ddp" if way == "DDP" else "auto"


def _whole(trainer: Any, module: Any) -> dict[str, Any]:
    """All trained weights on the CPU, in float64, under the names of the model without adapters; of adapters, what they add."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    def fetched(tensor: Any) -> Any:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double().cpu().numpy()

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    if module.adapted:
        layers = [(path, part) for path, part in module.model.get_base_model().named_modules() if hasattr(part, "lora_A")]
        return {
            f"{path}.weight": part.scaling["default"] * fetched(part.lora_B["default"].weight) @ fetched(part.lora_A["default"].weight)
            for path, part in layers
        }
    if isinstance(trainer.strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
            named = {name.replace("_fsdp_wrapped_module.", ""): fetched(one) for name, one in trainer.strategy.model.named_parameters()}
        return {name.removeprefix("model."): one for name, one in named.items()}
    return {name: fetched(one) for name, one in module.model.named_parameters()}


def difference(directory: Path, weights: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Return the largest relative difference of a line of the history from whole weights on the CPU.

    Args:
        directory: Has the base and the instruct model.
        weights: Trained weights, or what adapters add to the weights of the same names.
        row: The line.
    """
    import numpy as np
    from safetensors.torch import load_file

    base, start = (load_file(directory / name / "model.safetensors") for name in ("base", "instruct"))
    task, direction = {}, {}
    for name, tensor in start.items():
        direction[name] = (tensor - base[name]).double().numpy()
        value = weights.get(name)
        if value is None:
            task[name] = np.zeros(tensor.shape)
        else:
            # Both sides are float32, and subtracted in it.
            task[name] = value if len(weights) < len(start) else (value.astype(np.float32) - tensor.numpy()).astype(np.float64)
    worst = [_relative(row["task_norm"], np.sqrt(sum((one * one).sum() for one in task.values())))]
    for layer, figures in row["layers"].items():
        names = [name for name in task if name.startswith(f"{layer}.")]
        inner = sum(((task[name] + direction[name]) * direction[name]).sum() for name in names)
        lengths = [
            np.sqrt(sum((one[name] ** 2).sum() for name in names)) for one in (direction, {n: task[n] + direction[n] for n in names})
        ]
        worst.append(_relative(figures["alignment"], inner / (lengths[0] * lengths[1])))
    return max(worst)


def _relative(value: float, expected: Any) -> float:
    return float(abs(value - expected) / max(abs(expected), 1e-12))


def main(arguments: Sequence[str] | None = None, write: Callable[..., None] = publish) -> None:
    """Run all ways and publish the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # One process that is a run by itself, as torchrun starts one: strategies need a process group.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "1", "RANK": "0"}
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "benchmark"}
    ways = [way for way in WAYS if way != "QLoRA" or (options.accelerator == "gpu" and find_spec("bitsandbytes") is not None)]
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), options.hidden, options.blocks)
        size = (Path(folder) / "base/model.safetensors").stat().st_size
        results = {way: fit(Path(folder), way, options) for way in ways}
    rows = [
        [
            way,
            f"{one.step * 1000:.1f} ms",
            f"{one.measurement * 1000:.1f} ms",
            f"{one.memory / MIB:,.0f} MiB" if one.memory else "",
            f"{one.difference:.1e}",
        ]
        for way, one in results.items()
    ]
    lines = [
        f"A Llama of {size / 4e6:,.1f} M parameters in bfloat16 mixed precision on one {_device(options.accelerator)}, {options.steps} steps an epoch.",
        "",
        *table(["way", "step", "measurement", "peak memory", "largest relative difference from the CPU"], rows),
    ]
    write(
        "gpu", "The callback on one GPU", lines, {"options": vars(options), "results": {way: one._asdict() for way, one in results.items()}}
    )


def _device(accelerator: str) -> str:
    import torch

    return torch.cuda.get_device_name() if accelerator == "gpu" else "CPU"


if __name__ == "__main__":
    main()
