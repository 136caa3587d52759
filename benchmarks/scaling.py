"""Time and memory of a merge by model size and number of vectors; the time should grow linearly.

    python -m benchmarks.scaling [--parameters 0.1e9 0.5e9 1.1e9 2e9 4e9] [--vectors 1 2 4 8] [--directory DIR]

Each size runs with two saved bfloat16 vectors, each number of vectors at the second smallest size, as whole processes. Writes
benchmarks/results/scaling.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.bench import MIB, Run, lata, middle, process, publish, remove, table, weight_files, write_llama


def merged(directory: Path, parameters: float, count: int, rounds: int) -> tuple[Run, int]:
    """Merge ``count`` vectors; return time and memory, and the bytes read and written."""
    onto = write_llama(directory / "onto", parameters, 0)
    vectors = []
    for seed in range(1, count + 1):
        tuned = write_llama(directory / "tuned", parameters, seed)
        vectors.append(directory / f"vector-{seed}")
        process(lata("extract", onto, tuned, "--output", vectors[-1], "--dtype", "bfloat16"))
        remove(tuned)
    runs = []
    for _ in range(rounds):
        runs.append(process(lata("merge", onto, *vectors, "--scale", "0.3", "--output", directory / "output")))
        remove(directory / "output")
    size = sum(file.stat().st_size for file in weight_files(onto, *vectors, onto))
    for path in (onto, *vectors):
        remove(path)
    return middle(runs), size


def main() -> None:
    """Merge at all sizes and numbers of vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.1e9, 0.5e9, 1.1e9, 2e9, 4e9])
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="Where the models go, 30 GB for the default sizes; removed as it goes on.")
    options = parser.parse_args()
    rows, record = [], []
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        cases = [(parameters, 2) for parameters in options.parameters]
        cases += [(sorted(options.parameters)[:2][-1], count) for count in options.vectors if count != 2]
        for parameters, count in cases:
            run, size = merged(Path(folder), parameters, count, options.rounds)
            rows.append(
                [
                    f"{parameters / 1e9:g} B",
                    count,
                    f"{size / 1e9:.1f}",
                    f"{run.seconds:.2f}",
                    f"{run.seconds / size * 1e9:.2f}",
                    f"{run.peak / MIB:,.0f}",
                ]
            )
            record.append({"parameters": parameters, "vectors": count, "bytes": size, **run._asdict()})
    head = ["parameters", "vectors", "GB read and written", "seconds", "seconds per GB", "peak memory, MiB"]
    lines = [
        "Merges of saved bfloat16 vectors onto a bfloat16 model, whole processes, so 2 to 3 s of each are the start of Python and torch.",
        "",
    ]
    publish("scaling", "Scaling", [*lines, *table(head, rows)], {"rounds": options.rounds, "runs": record})


if __name__ == "__main__":
    main()
