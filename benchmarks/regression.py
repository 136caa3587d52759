"""Merging one matrix of an 8 B model from two vectors without samples: seconds, peak memory and precision.

    python -m benchmarks.regression [--rows 4096] [--columns 14336]

Each method runs once, in a separate process, on one thread; the peak memory is that of the process, the seconds are those of the solve alone. The lower
bound is one product τᵀτ of the same matrix in float64, and reading the bytes of both vectors once. A second part tests, on small layers trained by
gradient descent, whether matrices that are stored as one (q, k and v; gate and up) are better solved together or separately. Writes
benchmarks/results/regression.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench import MIB, process, publish, read_all, seconds_of, table
from lata_lightning.numerics.chunks import tensor_chunks
from lata_lightning.numerics.matrix_regression import Figures, Operand, Settings, regressed
from lata_lightning.numerics.singular import tsv_m

RANK = 256
"""Rank of the signal in a matrix, whose singular values fall as 1/k; noise is added to it."""
SEEDS = 20
WAYS = ("product", "regression", "regression in float32", "TSV-M")


def matrices(rows: int, columns: int) -> list[Tensor]:
    """Return two float32 matrices with falling singular values, which share half of their directions."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(RANK // 2, columns, generator=generator)
    weights = (1 / torch.arange(1, RANK + 1)).sqrt()
    drawn = []
    for _ in range(2):
        right = torch.cat([shared, torch.randn(RANK // 2, columns, generator=generator)])
        left = torch.randn(rows, RANK, generator=generator)
        drawn.append(1e-5 * (left * weights) @ right + 1e-5 * torch.randn(rows, columns, generator=generator))
    return drawn


def solved(taus: Sequence[Tensor], precision: torch.dtype = torch.float64) -> tuple[Tensor, Figures]:
    """Return the merged matrix and its figures."""
    figures = Figures.empty(len(taus))
    operands = [Operand(tensor_chunks(tau), tensor_chunks(tau)) for tau in taus]
    shape = (taus[0].shape[0], taus[0].shape[1])
    return torch.cat(list(regressed(operands, shape, Settings(precision=precision), figures))), figures


def one(way: str, rows: int, columns: int, output: Path) -> None:
    """Run one method in this process, and write its result."""
    torch.set_num_threads(1)
    taus = matrices(rows, columns)
    figures: Figures | None = None
    began = time.perf_counter()
    if way == "product":
        wide = taus[0].double()
        result = wide.T @ wide
    elif way == "TSV-M":
        result = tsv_m([tau.double() for tau in taus]).float()
    else:
        result, figures = solved(taus, torch.float32 if way.endswith("32") else torch.float64)
    seconds = time.perf_counter() - began
    torch.save(result if way != "product" else None, output.with_suffix(".pt"))
    condition = None if figures is None else figures.condition
    interference = None if figures is None else [(lost / own) ** 0.5 for lost, own in zip(figures.lost, figures.own, strict=True)]
    output.write_text(json.dumps({"seconds": seconds, "condition": condition, "interference": interference}), "utf-8")


def trained(inputs: Tensor, aims: Tensor, steps: int) -> Tensor:
    """Return the matrix that gradient descent on the squared error reaches from zero."""
    matrix = torch.zeros(aims.shape[0], inputs.shape[1], dtype=torch.float64)
    rate = 1 / torch.linalg.matrix_norm(inputs, 2).square()
    for _ in range(steps):
        matrix += rate * (aims - matrix @ inputs.T) @ inputs
    return matrix


def together_or_apart(seed: int) -> tuple[float, float, float]:
    """Return the error on the inputs of both tasks for three matrices of a layer: solved together, separately, and from the inputs themselves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width, count, each = 32, 200, (32, 8, 8)
    common = draw(width, width)
    inputs = [draw(count, 12) @ draw(12, width) + 0.3 * draw(count, width) @ common for _ in range(2)]
    # Queries, keys and values learn at different speeds.
    sizes = [torch.cat([scale * draw(rows, width) for rows, scale in zip(each, (1.0, 0.5, 2.0), strict=True)]) for _ in range(2)]
    taus = [trained(x, (size @ x.T), 30) for x, size in zip(inputs, sizes, strict=True)]

    def error(merged: Tensor) -> float:
        parts = [(((merged - tau) @ x.T).square().sum(), (tau @ x.T).square().sum()) for tau, x in zip(taus, inputs, strict=True)]
        return float(sum(lost / own for lost, own in parts)) / 2

    apart = torch.cat([solved([tau.split(each)[part] for tau in taus])[0] for part in range(3)])
    grams = [x.T @ x / count for x in inputs]
    total = sum(grams) + 1e-6 * torch.eye(width, dtype=torch.float64)
    by_inputs = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ torch.linalg.inv(total)
    return error(solved(taus)[0].double()), error(apart.double()), error(by_inputs)


def compared() -> list[tuple[float, ...]]:
    """Return the errors of ``together_or_apart`` for all seeds."""
    return [together_or_apart(seed) for seed in range(SEEDS)]


def main() -> None:
    """Run every method and publish the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--one", choices=WAYS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        one(options.one, options.rows, options.columns, options.output)
        return
    torch.set_num_threads(1)
    rows, record = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, way in enumerate(WAYS):
            output = Path(folder) / f"{number}.json"
            sizes = ["--rows", str(options.rows), "--columns", str(options.columns)]
            run = process([sys.executable, "-m", "benchmarks.regression", "--one", way, "--output", output, *sizes])
            record[way] = {**json.loads(output.read_text("utf-8")), "peak": run.peak}
        exact, lower = (torch.load(Path(folder) / f"{number}.pt", weights_only=True).double() for number in (1, 2))
        record["error of float32"] = float((exact - lower).norm() / exact.norm())
        stored = Path(folder) / "bytes"
        stored.write_bytes(bytes(2 * 4 * options.rows * options.columns))
        reading: Callable[[], float] = seconds_of(lambda: read_all([stored]))
        record["reading"] = reading()
    floor = record["product"]["seconds"]
    names = {"product": "one product τᵀτ (floor)", "regression": "regression, float64", "regression in float32": "regression, float32"}
    for way in WAYS:
        seconds = record[way]["seconds"]
        rows.append((names.get(way, way), f"{seconds:.1f}", f"{seconds / floor:.2f}", f"{record[way]['peak'] / MIB:.0f}"))
    errors = compared()
    means = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
    better = sum(apart < together for together, apart, _ in errors)
    record["together or apart"] = {"together": means[0], "apart": means[1], "with inputs": means[2], "apart better": better, "seeds": SEEDS}
    solve = record["regression"]
    lines = [
        f"One matrix of {options.rows} × {options.columns}, two float32 vectors in memory ({2 * 4 * options.rows * options.columns / MIB:.0f} MiB, "
        f"{record['reading']:.2f} s to read), one thread, each way once. Peak memory is that of the whole process, Python and torch included.",
        "",
        *table(["", "seconds", "of the floor", "peak memory, MiB"], rows),
        "",
        f"The condition number of what was solved is at most {solve['condition']:.3g}; the result in float32 differs from that in float64 by "
        f"{record['error of float32']:.1e} of its norm. Interference of the two vectors: {', '.join(f'{share:.3f}' for share in solve['interference'])}.",
        "",
        "Matrices that are stored as one, on layers of width 32 with rows for queries, keys and values that gradient descent has trained on two tasks. "
        f"The error is the share of what each vector does on the inputs of its task that the merge changes, squared, in the mean over {SEEDS} seeds:",
        "",
        *table(
            ["solved", "error"],
            [
                ("together, as stored", f"{means[0]:.4f}"),
                ("one by one", f"{means[1]:.4f}"),
                ("with the inputs themselves", f"{means[2]:.4f}"),
            ],
        ),
        "",
        f"One by one was better in {better} of {SEEDS} seeds.",
    ]
    publish("regression", "Regression without samples", lines, record)


if __name__ == "__main__":
    main()
