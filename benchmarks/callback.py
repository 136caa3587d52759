"""The cost of LATACallback in a training run: time per epoch, and memory for each way of storing the start weights.

    python -m benchmarks.callback [--hidden 768] [--blocks 8]

Time: the quickstart's math expert is trained; the time of the callback's measurements is compared with that of the epochs before them, and with a plain
sum over the same tensors. Memory: a larger model is trained for two steps, in one process for each way of storing the start weights, and the peak
resident memory is compared with that of a run without the callback. The same is done for Lightning's EMAWeightAveraging and, where trl is installed, for
its BEMACallback with the Trainer of transformers. Writes benchmarks/results/callback.json and .md.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bench import publish, table

PROVIDERS = ("memory", "spill", "source", "lora")


def training(directory: Path) -> dict[str, float]:
    """Return the seconds of an epoch, of the measurement after it, and of a plain sum over the tensors it reads."""
    import lightning.pytorch as pl
    import torch

    from lata_lightning import LATACallback, TaskVector
    from lata_lightning.quickstart.experts import BASE, INSTRUCT, fine_tune

    torch.set_num_threads(1)

    class Timed(LATACallback):
        spent: list[float] = []  # noqa: RUF012

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            began = time.perf_counter()
            super().on_train_epoch_end(trainer, pl_module)
            self.spent.append(time.perf_counter() - began)

    class Epochs(pl.Callback):
        spent: list[float] = []  # noqa: RUF012

        def on_train_epoch_start(self, *_: object) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            self.spent.append(time.perf_counter() - self.began)

    instruction = TaskVector.between(BASE, INSTRUCT, kind="instruction").save(directory / "instruction")
    module, data, options = fine_tune("math")
    callback, epochs = Timed(directory / "instruction", output_dir=directory / "run", base_weights="memory", table=False), Epochs()
    pl.Trainer(**{**options, "max_epochs": 3}, callbacks=[epochs, callback], default_root_dir=directory).fit(module, datamodule=data)
    live = [parameter.detach() for parameter in module.model.parameters()]
    sides = [*live, *(tensor.clone() for tensor in live), *(instruction[name] for name in instruction)]
    floors = []
    for _ in range(5):
        began = time.perf_counter()
        for tensor in sides:
            tensor.sum()
        floors.append(time.perf_counter() - began)
    return {"epoch": sorted(epochs.spent)[1], "measurement": sorted(callback.spent)[1], "plain sum": sorted(floors)[2]}


def peak(directory: Path, provider: str, hidden: int, blocks: int) -> None:
    """Train for two steps and print the peak resident memory in bytes; runs in a separate process."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from transformers import LlamaConfig, LlamaForCausalLM

    from lata_lightning import LATACallback

    torch.set_num_threads(1)
    start = directory / f"start-{hidden}-{blocks}"
    if not start.exists():
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=blocks, num_attention_heads=8, vocab_size=4096
        )
        LlamaForCausalLM(config).save_pretrained(start)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            model = LlamaForCausalLM.from_pretrained(start).train()
            if "lora" in provider:
                from peft import LoraConfig, get_peft_model

                model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
            self.model = model

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=1e-3)

    callbacks = []
    if provider.startswith("trainer"):
        _under_trainer(directory, provider, LlamaForCausalLM.from_pretrained(start))
        return
    if provider == "ema":
        callbacks = [EMAWeightAveraging()]
    elif not provider.startswith("without"):
        callbacks = [LATACallback(base_weights=provider, output_dir=directory / f"run-{provider}", export=(), table=False)]
    batches = torch.utils.data.DataLoader(torch.randint(0, 4096, (2, 16)), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=directory,
    )  # fmt: skip
    trainer.fit(Module(), batches)
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _under_trainer(directory: Path, provider: str, model: Any) -> None:
    """Train the same two steps with the Trainer of transformers, without or with trl's callback, which stores the start weights and an average."""
    import torch
    from transformers import Trainer, TrainingArguments

    callbacks = []
    if provider == "trainer-bema":
        from trl import BEMACallback

        callbacks = [BEMACallback(update_freq=1, update_after=0, min_ema_multiplier=0.0)]
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 4096, (2, 16))]
    options = TrainingArguments(
        directory / provider, max_steps=2, per_device_train_batch_size=1, use_cpu=True, optim="sgd", learning_rate=1e-3, save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, options, train_dataset=rows, callbacks=callbacks).train()
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured_peak(directory: Path, provider: str, options: argparse.Namespace) -> int:
    """Return the peak resident memory, in bytes, of a run in a separate process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.callback", "--provider", provider, "--directory", str(directory)]
    command += ["--hidden", str(options.hidden), "--blocks", str(options.blocks)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    return int(next(line for line in done.stdout.splitlines() if line.startswith("PEAK")).split()[1])


def main() -> None:
    """Run all comparisons, or with --provider one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provider:
        peak(options.directory, options.provider, options.hidden, options.blocks)
        return
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seconds = training(Path(folder))
        # This run writes the start model, so that it exists in all measured runs.
        measured_peak(Path(folder), "without", options)
        cases = ["without", "without-lora", *PROVIDERS, "ema"]
        if find_spec("trl") is not None:
            cases += ["trainer", "trainer-bema"]
        peaks = {provider: measured_peak(Path(folder), provider, options) for provider in cases}
        size = (Path(folder) / f"start-{options.hidden}-{options.blocks}" / "model.safetensors").stat().st_size
    report(seconds, peaks, size)


def report(seconds: dict[str, float], peaks: dict[str, int], size: int) -> None:
    """Publish the tables."""
    share, ratio = seconds["measurement"] / seconds["epoch"], seconds["measurement"] / seconds["plain sum"]
    lines = [
        "One torch thread.",
        "",
        *table(
            ["quickstart, math expert, one epoch of 75 steps", ""],
            [
                ["epoch", f"{seconds['epoch']:.2f} s"],
                [
                    "measurement at its end, logging and history included",
                    f"{seconds['measurement'] * 1000:.1f} ms, {share:.2%} of the epoch",
                ],
                ["plain float32 sum over live, start and instruction tensors", f"{seconds['plain sum'] * 1000:.1f} ms"],
                ["measurement / plain sum", f"{ratio:.1f}"],
            ],
        ),
        "",
        f"Peak resident memory of a run of two steps, {size / 4e6:.0f} M parameters in float32 ({size / 2**20:.0f} MiB):",
        "",
    ]
    rows = []
    named = {
        **{provider: provider for provider in PROVIDERS},
        "ema": "beside it: EMAWeightAveraging of Lightning",
        "trainer-bema": "beside it: BEMACallback of trl",
    }
    for provider, name in named.items():
        if provider in peaks:
            without = {"lora": "without-lora", "trainer-bema": "trainer"}.get(provider, "without")
            extra = peaks[provider] - peaks[without]
            each = "–" if provider == "lora" else f"{extra / (size / 4):.2f} bytes"
            rows.append([name, f"{extra / 2**20:+.0f} MiB", each])
    lines += table(["start weights", "more than without the callback", "per trainable parameter"], rows)
    publish("callback", "Cost of the callback", lines, {"seconds": seconds, "peak_bytes": peaks, "model_bytes": size})


if __name__ == "__main__":
    main()
