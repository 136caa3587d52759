"""Extract, align and the epoch-end measurement, compared with reading or summing the same bytes once.

    python -m benchmarks.measuring [--parameters 0.5e9] [--rounds 5] [--directory DIR]

Extract and align run as whole processes and, without the start-up of Python and torch, as calls; the lower bound reads every byte once (and for extract
writes as many). The epoch-end measurement runs in memory on one thread, compared with ``tensor.sum()`` over the tensors it reads. Writes
benchmarks/results/measuring.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.bench import (
    MIB,
    copy_floor,
    in_turn,
    lata,
    llama_shapes,
    median,
    middle,
    process,
    publish,
    read_all,
    remove,
    seconds_of,
    table,
    weight_files,
    write_llama,
)
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.measure import tensor_sums
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

RANK = 16


def in_memory(rounds: int) -> list[tuple[str, float, float]]:
    """Return the seconds of the measurement at an epoch's end, and of a plain sum over the same tensors."""
    shapes = {name: shape for name, shape in llama_shapes(0.1e9).items() if len(shape) == 2}
    torch.set_num_threads(1)
    start = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    live = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in start.items()}
    direction = {name: torch.randn_like(tensor) * 1e-3 for name, tensor in start.items()}
    known = {name: tensor_sums(tensor)[1].item() for name, tensor in direction.items()}
    factors = {
        name: LowRank(shape, (Factors(torch.randn(shape[0], RANK), torch.randn(RANK, shape[1]), 2.0),)) for name, shape in shapes.items()
    }

    def floor(*sides: dict[str, torch.Tensor]) -> None:
        for side in sides:
            for tensor in side.values():
                tensor.sum()

    def full() -> None:
        for name in shapes:
            tensor_sums(live[name], direction[name], subtract=start[name], instruction_squared=known[name])

    def lora(instruction: dict[str, torch.Tensor] | dict[str, LowRank] | None) -> None:
        for name in shapes:
            tensor_sums(factors[name], None if instruction is None else instruction[name], instruction_squared=known[name])

    small = {name: part.parts[0].left for name, part in factors.items()} | {
        f"{name}'": part.parts[0].right for name, part in factors.items()
    }
    cases = {
        "full fine-tune, float32: live, start and instruction vector": (full, lambda: floor(live, start, direction)),
        f"LoRA of rank {RANK}, dense instruction vector": (lambda: lora(direction), lambda: floor(direction, small)),
        f"LoRA of rank {RANK}, instruction vector of rank {RANK}": (lambda: lora(factors), lambda: floor(small, small)),
        f"LoRA of rank {RANK}, no instruction vector": (lambda: lora(None), lambda: floor(small)),
    }
    rows = []
    for name, (work, least) in cases.items():
        times = in_turn({"ours": seconds_of(work), "floor": seconds_of(least)}, rounds + 1)
        rows.append((name, median(times["ours"][1:]), median(times["floor"][1:])))
    return rows


def on_disk(directory: Path, parameters: float, rounds: int) -> tuple[list[list[object]], list[dict[str, object]]]:
    """Time extract and align as processes and as calls, and their lower bounds."""
    onto, tuned = (write_llama(directory / f"model-{seed}", parameters, seed) for seed in range(2))
    for dtype in ("bfloat16", "float32"):
        process(lata("extract", onto, tuned, "--output", directory / f"vector-{dtype}", "--dtype", dtype))
    output = directory / "output"

    def extract(dtype: str) -> None:
        remove(output)
        TaskVector.between(onto, tuned).save(output, dtype=dtype)

    def extract_process(dtype: str) -> object:
        remove(output)
        return process(lata("extract", onto, tuned, "--output", output, "--dtype", dtype))

    def extract_floor(dtype: str) -> None:
        remove(output)
        copy_floor(weight_files(onto, tuned), directory / f"vector-{dtype}", output)

    vector = directory / "vector-float32"
    rows: list[list[object]] = []
    record: list[dict[str, object]] = []
    TaskVector.between(onto, tuned)  # imports transformers
    for name, call, whole, least in (
        ("extract to bfloat16", lambda: extract("bfloat16"), lambda: extract_process("bfloat16"), lambda: extract_floor("bfloat16")),
        ("extract to float32", lambda: extract("float32"), lambda: extract_process("float32"), lambda: extract_floor("float32")),
        (
            "align two float32 vectors",
            lambda: align(TaskVector.open(vector), TaskVector.open(vector), check_base=False),
            lambda: process(lata("align", vector, "--instruction", vector, "--check-base", "false")),
            lambda: read_all(weight_files(vector, vector)),
        ),
    ):
        times = in_turn({"call": seconds_of(call), "floor": seconds_of(least), "process": whole}, rounds)
        run, mine, floor = middle(times["process"]), median(times["call"]), median(times["floor"])
        rows.append([name, f"{floor:.2f}", f"{mine:.2f}", f"{mine / floor:.2f}", f"{run.seconds:.2f}", f"{run.peak / MIB:,.0f}"])
        record.append({"name": name, "floor": floor, "call": mine, "process": run._asdict()})
    return rows, record


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="Where the models go, 7 GB for the default size; removed at the end.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        rows, record = on_disk(Path(folder), options.parameters, options.rounds)
    kernel = in_memory(options.rounds)
    lines = [
        f"{options.parameters / 1e9:g} B parameters in bfloat16, page cache warm, median of {options.rounds} rounds in turn. The floor reads all input "
        "bytes once; for extract it also copies as many bytes as the vector has, with cp.",
        "",
        *table(["", "floor, s", "call, s", "call / floor", "whole process, s", "its peak memory, MiB"], rows),
        "",
        "The measurement at the end of an epoch, 0.1 B parameters in memory, one thread, beside a plain `tensor.sum()` over the same tensors:",
        "",
        *table(
            ["", "measurement, ms", "plain sum, ms", "ratio"],
            [[name, f"{ours * 1e3:.1f}", f"{least * 1e3:.1f}", f"{ours / least:.2f}"] for name, ours, least in kernel],
        ),
        "",
        f"With a dense instruction vector LoRA costs {2 * RANK} operations per entry of that vector, which no longer is the speed of the memory; with "
        "one in factors the cost grows with the rank and the sum of both sides, not with their product.",
    ]
    memory = [{"name": name, "measurement": ours, "plain sum": least} for name, ours, least in kernel]
    publish(
        "measuring", "Measuring", lines, {"parameters": options.parameters, "rounds": options.rounds, "files": record, "memory": memory}
    )


if __name__ == "__main__":
    main()
