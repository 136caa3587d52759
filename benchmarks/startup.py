"""The start-up time of the commands.

    python -m benchmarks.startup [--rounds 7]

Writes benchmarks/results/startup.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.bench import in_turn, lata, middle, process, publish, table, write_llama


def main() -> None:
    """Time whole processes in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_llama(Path(folder) / "model", 0.1e9, 0)
        vector = Path(folder) / "vector"
        process(lata("extract", model, model, "--output", vector))
        sides = {
            "python": [sys.executable, "-c", "pass"],
            "lata --help": lata("--help"),
            "lata inspect VECTOR": lata("inspect", vector),
            "lata inspect MODEL": lata("inspect", model),
            "import torch": [sys.executable, "-c", "import torch"],
            "import lightning.pytorch": [sys.executable, "-c", "import lightning.pytorch"],
            "import lightning.pytorch, lata_lightning": [sys.executable, "-c", "import lightning.pytorch, lata_lightning"],
        }
        runs_of = in_turn({name: lambda command=command: process(command) for name, command in sides.items()}, options.rounds + 1)
    runs = {name: middle(values[1:]) for name, values in runs_of.items()}
    rows = [[f"`{name}`", f"{run.seconds:.2f}", f"{run.cpu:.2f}"] for name, run in runs.items()]
    lines = [f"Whole processes, median of {options.rounds} rounds in turn.", "", *table(["", "seconds", "processor seconds"], rows)]
    publish("startup", "Start-up", lines, {"rounds": options.rounds, "runs": {name: run._asdict() for name, run in runs.items()}})


if __name__ == "__main__":
    main()
