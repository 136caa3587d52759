"""Shared code of the benchmarks: models of a given size, processes with their peak memory, lower bounds, and pages of results."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
BLOCK = 1 << 22
MIB = 1 << 20


# The peak memory of a new process starts at that of its parent, so a small process starts it.
_LAUNCHER = """
import json, os, subprocess, sys, time
log, *command = sys.argv[1:]
with open(log, 'wb') as output:
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=output, stderr=output)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
child.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([child.returncode, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


class Run(NamedTuple):
    """Wall time and processor time of one process in seconds, and its peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def process(command: Sequence[str | Path], cwd: Path | None = None) -> Run:
    """Run a command and return its time and memory.

    Raises:
        RuntimeError: The command failed; the message holds the end of its output.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"benchmark-{os.getpid()}.log"  # noqa: S108
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(log), *map(str, command)]
    told = subprocess.run(launched, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    code, seconds, cpu, peak = json.loads(told.stdout)
    text = log.read_text("utf-8", "replace")
    log.unlink()
    if code:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{text[-2000:]}")
    return Run(seconds, cpu, peak)


def lata(*arguments: str | Path) -> list[str | Path]:
    """Return the command that runs lata in a separate process."""
    return [sys.executable, "-m", "lata_lightning", *arguments]


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Run the sides in turn, so that other load on the machine slows all of them, and return the results of each."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            results[name].append(work())
    return results


def seconds_of(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that does the work and returns the seconds it took."""

    def timed() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return timed


def median(values: Sequence[float]) -> float:
    """Return the median of some values."""
    return statistics.median(values)


def middle(runs: Sequence[Run]) -> Run:
    """Return the median of each figure over several runs."""
    return Run(*(statistics.median(figures) for figures in zip(*runs, strict=True)))


def llama_shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama of about that many parameters; 1.1e9 gives TinyLlama."""
    hidden, blocks = {0.1e9: (768, 8), 0.5e9: (1536, 14), 1.1e9: (2048, 22), 2e9: (2560, 27), 4e9: (3072, 37)}[parameters]
    inner, vocabulary = hidden * 11 // 4, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (256, hidden) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{block}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config.json for these tensors."""
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in shapes),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_llama(directory: Path, parameters: float, seed: int, shard_bytes: int = 1 << 30) -> Path:
    """Write a sharded bfloat16 model of random weights; other seeds differ from seed 0 by a small random amount."""
    import torch

    from lata_lightning.store.writer import ShardWriter

    shapes = llama_shapes(parameters)
    directory.mkdir(parents=True)
    layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with ShardWriter(directory, "model", layout, max_shard_bytes=shard_bytes, metadata={"format": "pt"}) as writer:
        for index, name in enumerate(layout):
            generator = torch.Generator().manual_seed(index)
            tensor = torch.randn(shapes[name], generator=generator) * 0.02
            if seed:
                generator.manual_seed(1000 * seed + index)
                tensor += torch.randn(shapes[name], generator=generator) * 0.001
            writer.write(name, tensor.bfloat16())
    (directory / "config.json").write_text(json.dumps(llama_config(shapes)), "utf-8")
    return directory


def weight_files(*directories: Path) -> list[Path]:
    """Return the safetensors files of some directories."""
    return [file for directory in directories for file in sorted(directory.glob("*.safetensors"))]


def read_all(files: Sequence[Path]) -> None:
    """Read every byte once."""
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def copy_floor(read: Sequence[Path], written: Path, target: Path) -> None:
    """Read the other files once and copy a model with ``cp``: the bytes that a merge must read and write, and nothing else."""
    rest = [file for file in read if file.parent != written]
    subprocess.run(["cat", *map(str, rest)], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["cp", "-r", str(written), str(target)], check=True)


def remove(path: Path) -> None:
    """Remove an output, so that the next round writes it anew."""
    shutil.rmtree(path, ignore_errors=True)


def machine() -> str:
    """Describe the machine and the library versions."""
    from lata_lightning.vectors.manifest import library_versions

    versions = library_versions()
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("lata_lightning", "torch", "transformers", "peft", "lightning") if name in versions
    )
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {named}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def publish(name: str, title: str, lines: Sequence[str], record: Mapping[str, Any]) -> None:
    """Print a page of results, and write it and the record as ``results/NAME.md`` and ``.json``."""
    page = [f"# {title}", "", f"Measured on {machine()}. Made by `python -m benchmarks.{name}`.", "", *lines]
    print("\n".join(page))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(page) + "\n", "utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **record}, indent=2) + "\n", "utf-8")
