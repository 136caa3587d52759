"""What LATACallback costs a training run: time against the epoch, and memory by way of keeping the start weights.

    python -m benchmarks.callback [--hidden 768] [--blocks 8]

Time: the quickstart's math expert is trained for two epochs; what the callback's measurements take is compared with the epochs they follow, and with a
plain sum over the same tensors. Memory: a larger model takes two steps in a process of its own for each way of keeping the start weights, and the
peak resident memory is compared with that of the run without the callback; so is that of Lightning's EMAWeightAveraging and, where trl is
installed, of its BEMACallback under the Trainer of transformers. Writes benchmarks/results/callback.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("memory", "spill", "source", "lora")


def training(directory: Path) -> dict[str, float]:
    """Seconds of an epoch, of the measurement after it, and of a plain sum over the tensors it reads."""
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
    """Train two steps and print the peak resident memory in bytes; runs in a process of its own."""
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
    """The same two steps by the Trainer of transformers, without and with trl's callback, which keeps the start weights and an average."""
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
    """Peak resident memory of a run in a process of its own, in bytes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.callback", "--provider", provider, "--directory", str(directory)]
    command += ["--hidden", str(options.hidden), "--blocks", str(options.blocks)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    return int(next(line for line in done.stdout.splitlines() if line.startswith("PEAK")).split()[1])


def main() -> None:
    """Run all comparisons, or with --provider one of the processes they start."""
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
        # The first run writes the start model, so that all that count find it.
        measured_peak(Path(folder), "without", options)
        cases = ["without", "without-lora", *PROVIDERS, "ema"]
        if find_spec("trl") is not None:
            cases += ["trainer", "trainer-bema"]
        peaks = {provider: measured_peak(Path(folder), provider, options) for provider in cases}
        size = (Path(folder) / f"start-{options.hidden}-{options.blocks}" / "model.safetensors").stat().st_size
    report(seconds, peaks, size)


def report(seconds: dict[str, float], peaks: dict[str, int], size: int) -> None:
    """Print the tables and write them as JSON and Markdown."""
    from lata_lightning.vectors.manifest import library_versions

    machine = f"{platform.machine()}, {os.cpu_count()} cores, one torch thread, Python {platform.python_version()}"
    versions = library_versions()
    share, ratio = seconds["measurement"] / seconds["epoch"], seconds["measurement"] / seconds["plain sum"]
    lines = [
        f"{machine}, torch {versions.get('torch')}, lightning {versions.get('lightning')}. Made by `python -m benchmarks.callback`.",
        "",
        "| quickstart, math expert, one epoch of 75 steps | |",
        "|---|---|",
        f"| epoch | {seconds['epoch']:.2f} s |",
        f"| measurement at its end, logging and history included | {seconds['measurement'] * 1000:.1f} ms, {share:.2%} of the epoch |",
        f"| plain float32 sum over live, start and instruction tensors | {seconds['plain sum'] * 1000:.1f} ms |",
        f"| measurement / plain sum | {ratio:.1f} |",
        "",
        f"Peak resident memory of a run of two steps, {size / 4e6:.0f} M parameters in float32 ({size / 2**20:.0f} MiB):",
        "",
        "| start weights | more than without the callback | per trainable parameter |",
        "|---|---|---|",
    ]
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
            lines.append(f"| {name} | {extra / 2**20:+.0f} MiB | {each} |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "callback.md").write_text("# Cost of the callback\n\n" + text, "utf-8")
    record = {"machine": machine, "versions": versions, "seconds": seconds, "peak_bytes": peaks, "model_bytes": size}
    (RESULTS / "callback.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
