"""Peak memory of whole commands on models of the shapes of SmolLM2-135M, Gemma-3-270m and MiniLM-L6, with random weights.

    python -m benchmarks.memory [--shapes smollm2 gemma3 minilm] [--directory DIR]

Every command runs as a process of its own, one at a time, on four rows of 256 tokens a step. What counts is its peak resident memory beyond the weights
in float32, once, and beyond a process that has only imported the libraries. A fine-tune of all weights needs three times as much again for gradients and
the two moments of AdamW; that is subtracted too. Writes benchmarks/results/memory.json and .md, in which shapes that are not measured keep their figures.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench import RESULTS, ROOT, lata, process, publish, table

TOKENIZER = ROOT / "lata_lightning" / "quickstart" / "checkpoints" / "instruct"
ROWS, LENGTH, STEPS, CLASSES = 4, 256, 3, 150
LIMIT = 2 << 30
KEPT = RESULTS / "memory.json"
HELD = {"full fine-tune": 4}
"""How often a command holds the weights: a fine-tune of all of them also holds a gradient and two moments of AdamW for each."""


class Shape(NamedTuple):
    """A model to make.

    Attributes:
        title: What it is shaped like.
        classifier: Whether it is fine-tuned as an encoder with a head of its own.
        build: Makes it, with random weights.
    """

    title: str
    classifier: bool
    build: Callable[[], Any]


def smollm2() -> Any:
    """30 blocks of width 576, 49,152 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes, tie_word_embeddings=True, pad_token_id=257, eos_token_id=256)).bfloat16()


def gemma3() -> Any:
    """18 blocks of width 640, 262,144 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262144, head_dim=256, **sizes, pad_token_id=257, eos_token_id=256)).bfloat16()


def minilm() -> Any:
    """6 blocks of width 384, 30,522 tokens, without a head."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertModel(BertConfig(vocab_size=30522, **sizes, pad_token_id=257))


SHAPES = {
    "smollm2": Shape("SmolLM2-135M", False, smollm2),
    "gemma3": Shape("Gemma-3-270m", False, gemma3),
    "minilm": Shape("MiniLM-L6", True, minilm),
}


def write_start(shape: Shape, directory: Path) -> int:
    """Write a model and a tokenizer of bytes; the size of its weights in float32, in bytes."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = shape.build()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(directory)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def write_data(folder: Path) -> None:
    """Texts of a row each, the same as questions with answers, and texts of many classes."""
    generator = random.Random(0)
    texts = ["".join(generator.choices(string.ascii_lowercase + "    ", k=LENGTH - 1)) for _ in range(ROWS * STEPS)]
    rows = {
        "texts": [{"text": text} for text in texts],
        "questions": [{"question": text[: LENGTH - 40], "answer": text[:8]} for text in texts],
        "labels": [{"text": text, "label": number % CLASSES} for number, text in enumerate(texts)],
    }
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")


def fit(recipe: str, data: str, output: str, *more: str) -> list[str | Path]:
    """A short fine-tune without validation."""
    return lata(
        "fit", "--config", recipe, "--model.model", "start", "--data.data", data, "--data.validation_share", "0", "--data.batch_size", str(ROWS),
        "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--lata.instruction_vector", "null", "--output", output, *more,
    )  # fmt: skip


def commands(shape: Shape) -> dict[str, list[str | Path]]:
    """What is run, in this order, in a folder with ``start`` and the data."""
    merged = lata("merge", "start", "full/lata/task_vector", "--weighting", "none", "--output", "merged")
    tuned = ["start", "full/lata/task_vector", "--grid", "0.5", "1", "--weighting", "none", "--figure", "false"]
    peft = lata("export", "full/lata/task_vector", "--to", "peft", "--weighting", "none", "--output", "peft")
    if shape.classifier:
        scored = ["--data", "labels.jsonl", "--head", "full/lata"]
        return {
            "full fine-tune": fit("classify", "labels.jsonl", "full", "--model.num_labels", str(CLASSES)),
            "merge": merged,
            "evaluate, accuracy": lata("evaluate", "merged", *scored),
            "tune, accuracy": lata("tune", *tuned, *scored, "--output", "tuned"),
            "export to peft": peft,
        }
    length, windows = ["--data.context_length", str(LENGTH)], ["--data", "texts.jsonl", "--context-length", str(LENGTH)]
    return {
        "LoRA fine-tune": fit("track_lora", "texts.jsonl", "lora", *length),
        "full fine-tune": fit("track_full", "texts.jsonl", "full", *length),
        "merge": merged,
        "merge of LoRA": lata("merge", "start", "lora/lata/task_vector", "--weighting", "none", "--output", "merged-lora"),
        "evaluate, perplexity": lata("evaluate", "merged", *windows),
        "evaluate, exact match": lata("evaluate", "merged", "--data", "questions.jsonl"),
        "tune, perplexity": lata("tune", *tuned, *windows, "--output", "tuned"),
        "export to peft": peft,
        "export of LoRA to peft": lata("export", "lora/lata/task_vector", "--to", "peft", "--weighting", "none", "--output", "peft-lora"),
    }


def libraries() -> int:
    """Peak memory of a process that imports what a fine-tune imports and does nothing."""
    names = "lightning.pytorch, peft, datasets, torchmetrics, lata_lightning.training.module, lata_lightning.callbacks.lata"
    return process([sys.executable, "-c", f"import {names}; from transformers import LlamaForCausalLM"]).peak


def measure(name: str, folder: Path, imported: int) -> list[dict[str, Any]]:
    """Peak memory of every command on one shape."""
    shape = SHAPES[name]
    size = write_start(shape, folder / "start")
    write_data(folder)
    found = []
    for title, command in commands(shape).items():
        run = process(command, folder)
        beyond = run.peak - size * HELD.get(title, 1) - imported
        found.append({"shape": shape.title, "command": title, "weights": size, "peak": run.peak, "beyond": beyond, "seconds": run.seconds})
        print(f"{shape.title}, {title}: {run.peak / 2**30:.2f} GiB, {beyond / 2**30:.2f} beyond, {run.seconds:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure every shape and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--directory", type=Path, help="Where to make the models; by default a temporary folder.")
    options = parser.parse_args()
    imported = libraries()
    # Shapes that are not measured now keep their figures.
    runs: list[dict[str, Any]] = json.loads(KEPT.read_text("utf-8"))["runs"] if KEPT.exists() else []
    for name in options.shapes:
        runs = [run for run in runs if run["shape"] != SHAPES[name].title]
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            runs += measure(name, Path(folder), imported)
    rows = [[run["shape"], run["command"], *(f"{run[key] / 2**30:.2f}" for key in ("weights", "peak", "beyond"))] for run in runs]
    most = max(runs, key=lambda run: run["beyond"])
    lines = [
        f"Peak resident memory of whole commands in GiB, on the CPU, at {ROWS} rows of {LENGTH} tokens a step, with random weights of these shapes.",
        f"Beyond the model is the peak without the weights in float32, once, and without Python and its libraries, {imported / 2**30:.2f} GiB.",
        "A full fine-tune also holds a gradient and the two moments of AdamW for every weight, so that four times the weights are taken off.",
        "A command below 0 needs less than the whole model, or not all of the libraries.",
        "",
        *table(["shape", "command", "weights", "peak", "beyond the model"], rows),
        "",
        f"The most is {most['beyond'] / 2**30:.2f} GiB, of {most['command']} on {most['shape']}; the aim is at most {LIMIT >> 30} GiB.",
    ]
    publish(
        "memory", "Memory of whole commands", lines, {"libraries": imported, "rows": ROWS, "length": LENGTH, "steps": STEPS, "runs": runs}
    )


if __name__ == "__main__":
    main()
