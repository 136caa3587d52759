"""Measuring, extracting and merging beside the floor of each: a plain pass over the same bytes, in the same run.

    make benchmark          or: python -m benchmarks.streaming [--hidden 1024] [--blocks 8] [--rounds 5]

Prints ratios and writes benchmarks/results/streaming.json and .md. Both sides run in turn, several times; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lata_lightning.merging import Term, merge
from lata_lightning.store.manifest import library_versions
from lata_lightning.store.task_vector import TaskVector
from lata_lightning.sums import tensor_sums

RESULTS = Path(__file__).parent / "results"
BLOCK = 1 << 22


def shapes(hidden: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama of that width and depth."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8192, hidden)}
    for index in range(blocks):
        block = f"model.layers.{index}"
        found |= {f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{block}.mlp.{name}_proj.weight": (hidden * 3, hidden) for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (hidden, hidden * 3)
    return found


def median_seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each side; the sides take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measuring(start: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """The epoch-end measurement against a plain float32 sum over live, start and instruction tensors."""
    live = {name: tensor + 1e-3 for name, tensor in start.items()}
    direction = {name: tensor * 0.5 for name, tensor in start.items()}
    return median_seconds(
        {
            "ours": lambda: [tensor_sums(live[name], direction[name], subtract=start[name]) for name in start],
            "floor": lambda: [tensor.sum() for side in (live, start, direction) for tensor in side.values()],
        },
        rounds,
    )


def read_files(files: list[Path]) -> None:
    """Read every byte once."""
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def copy_bytes(files: list[Path], read: int, target: Path) -> None:
    """Read all files, and write as many bytes as the last of them holds."""
    read_files(files[:read])
    with files[-1].open("rb") as source, target.open("wb") as copy:
        while chunk := source.read(BLOCK):
            copy.write(chunk)
        os.fsync(copy.fileno())
    target.unlink()


def fresh(directory: Path, counter: list[int]) -> Path:
    """A path that does not exist yet."""
    counter[0] += 1
    return directory / f"output-{counter[0]}"


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    start = {name: torch.randn(shape) * 0.02 for name, shape in shapes(options.hidden, options.blocks).items()}
    parameters = sum(tensor.numel() for tensor in start.values())
    rows = {"epoch-end measurement / plain sum over the same tensors": measuring(start, options.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        models = []
        for index in range(3):
            model = directory / f"model-{index}"
            model.mkdir()
            state = {name: (tensor + 1e-3 * index * torch.randn_like(tensor)).bfloat16() for name, tensor in start.items()}
            save_file(state, model / "model.safetensors", metadata={"format": "pt"})
            models.append(model)
        files = [model / "model.safetensors" for model in models]
        counter = [0]
        outputs: list[Path] = []

        def extract() -> None:
            outputs.append(fresh(directory, counter))
            TaskVector.between(models[0], models[1]).save(outputs[-1], dtype="bfloat16")

        def merge_two() -> None:
            outputs.append(fresh(directory, counter))
            merge(models[0], [Term(TaskVector.between(models[0], model), 0.5) for model in models[1:]], outputs[-1])

        for name, work, read in (
            ("extract to bfloat16 / read both models and write one", extract, 2),
            ("merge of two tuned models / read three models and write one", merge_two, 3),
        ):
            rows[name] = median_seconds(
                {"ours": work, "floor": lambda read=read: copy_bytes([*files[:read], files[0]], read, directory / "copy")}, options.rounds
            )
            for output in outputs:
                for file in output.iterdir():
                    file.unlink()
                output.rmdir()
            outputs.clear()
    report(rows, parameters, options.rounds)


def report(rows: dict[str, dict[str, float]], parameters: int, rounds: int) -> None:
    """Print the table and write it as JSON and Markdown."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s), Python {platform.python_version()}"
    versions = library_versions()
    lines = [
        f"{parameters / 1e6:.0f} M parameters, median of {rounds} rounds, {machine}, torch {versions.get('torch')}.",
        "Made by `make benchmark`.",
        "",
        "| ours / floor | ours, s | floor, s | ratio |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {row['ours']:.3f} | {row['floor']:.3f} | {row['ours'] / row['floor']:.2f} |" for name, row in rows.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming.md").write_text("# Streaming\n\n" + text, "utf-8")
    record = {"parameters": parameters, "rounds": rounds, "machine": machine, "versions": versions, "seconds": rows}
    (RESULTS / "streaming.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
