"""A merge as a whole process, compared with mergekit, FusionBench, a loop over transformers models, and cp of the bytes to read and write.

    python -m benchmarks.merging [--parameters 1.1e9] [--rounds 3] [--mergekit PATH/TO/mergekit-yaml] [--fusion-bench PATH/TO/python] [--directory DIR]

Onto and two tuned models in bfloat16, sharded, page cache warm. Writes benchmarks/results/merging.json and .md. ``make parity`` makes an environment
with mergekit: --mergekit .venv-parity/bin/mergekit-yaml. FusionBench runs in the environment of the given python; it has one scale for all vectors, which
does not change what is read, computed and written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.bench import (
    MIB,
    Run,
    copy_floor,
    in_turn,
    lata,
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

SCALES = (0.5, 0.3)
LOOP = """
import sys, torch
from transformers import AutoModelForCausalLM
onto, *tuned, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(onto, dtype="auto")
start = model.state_dict()
total = {name: tensor.float() for name, tensor in start.items()}
for path, scale in zip(tuned, (0.5, 0.3)):
    for name, tensor in AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict().items():
        total[name] += scale * (tensor.float() - start[name].float())
model.load_state_dict({name: tensor.to(start[name].dtype) for name, tensor in total.items()})
model.save_pretrained(output)
"""


FUSION_BENCH = """
import sys
from fusion_bench.method import TaskArithmeticAlgorithm
from fusion_bench.modelpool import CausalLMPool
onto, *tuned, output = sys.argv[1:]
models = {"_pretrained_": onto, **{f"expert_{index}": path for index, path in enumerate(tuned)}}
pool = CausalLMPool(models, tokenizer=None, model_kwargs={"torch_dtype": "bfloat16"})
TaskArithmeticAlgorithm(scaling_factor=0.4).run(pool).save_pretrained(output)
"""


def main() -> None:
    """Run all sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="mergekit-yaml of an environment that has it.")
    parser.add_argument("--fusion-bench", help="python of an environment that has FusionBench.")
    parser.add_argument("--directory", type=Path, help="Where the models go, 15 GB for the default size; removed at the end.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        compare(Path(folder), options)


def compare(directory: Path, options: argparse.Namespace) -> None:
    """Make the models and merge them in every way."""
    onto, *tuned = (write_llama(directory / f"model-{seed}", options.parameters, seed) for seed in range(3))
    vectors = [directory / f"vector-{index}" for index in range(len(tuned))]
    for model, vector in zip(tuned, vectors, strict=True):
        process(lata("extract", onto, model, "--output", vector, "--dtype", "bfloat16"))
    output = directory / "output"
    scales = [str(scale) for scale in SCALES]

    def prepared(*given: Path) -> None:
        """Remove the output, flush writes, and read the inputs into the page cache again."""
        remove(output)
        os.sync()
        read_all(weight_files(onto, *given))

    def ours(*given: Path) -> Run:
        prepared(*given)
        return process(lata("merge", onto, *given, "--scale", *scales, "--output", output))

    def by_loop() -> Run:
        prepared(*tuned)
        return process([sys.executable, "-c", LOOP, onto, *tuned, output])

    def by_fusion_bench() -> Run:
        prepared(*tuned)
        return process([options.fusion_bench, "-c", FUSION_BENCH, onto, *tuned, output])

    def by_mergekit() -> Run:
        prepared(*tuned)
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(onto),
            "dtype": "bfloat16",
            "models": [{"model": str(model), "parameters": {"weight": scale}} for model, scale in zip(tuned, SCALES, strict=True)],
        }
        (directory / "merge.yaml").write_text(json.dumps(config), "utf-8")
        return process([options.mergekit, directory / "merge.yaml", output, "--no-copy-tokenizer"])

    def floor(given: list[Path]) -> float:
        prepared(*given)
        return seconds_of(lambda: copy_floor(weight_files(onto, *given), onto, output))()

    sides = {
        "lata merge, two tuned models": lambda: ours(*tuned),
        "lata merge, two saved vectors (bfloat16)": lambda: ours(*vectors),
        "cp of the same bytes": lambda: floor(tuned),
        "transformers and a loop": by_loop,
    }
    if options.mergekit:
        sides["mergekit-yaml, two tuned models"] = by_mergekit
    if options.fusion_bench:
        sides["FusionBench, two tuned models"] = by_fusion_bench
    results = in_turn(sides, options.rounds)
    floors = sorted(results.pop("cp of the same bytes"))
    least = floors[len(floors) // 2]
    runs = {name: middle(values) for name, values in results.items()}
    best = runs["lata merge, two tuned models"]
    rows: list[list[object]] = [["cp of the same bytes", f"{least:.1f}", "–", "–", "1.0", "–"]]
    for name, run in runs.items():
        ratio = f"{run.seconds / best.seconds:.1f}"
        rows.append([name, f"{run.seconds:.1f}", f"{run.cpu:.1f}", f"{run.peak / MIB:,.0f}", f"{run.seconds / least:.1f}", ratio])
    read = sum(file.stat().st_size for file in weight_files(onto, *tuned))
    written = sum(file.stat().st_size for file in weight_files(onto))
    lines = [
        f"{options.parameters / 1e9:g} B parameters in bfloat16, onto and two vectors, {read / 1e9:.1f} GB read and {written / 1e9:.1f} GB written, "
        f"page cache warm, whole processes, median of {options.rounds} rounds in turn.",
        "",
        *table(["", "seconds", "processor seconds", "peak memory, MiB", "× cp", "× lata merge"], rows),
    ]
    record = {
        "parameters": options.parameters,
        "rounds": options.rounds,
        "bytes": {"read": read, "written": written},
        "cp": floors,
        "runs": {name: [run._asdict() for run in values] for name, values in results.items()},
    }
    publish("merging", "Merging", lines, record)


if __name__ == "__main__":
    main()
