"""Tiny random models and a few generated rows of every data set, to run every part of the study offline in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.store.writer import atomic_directory
from study.real.configuration import Configuration, Setting, Tuning

CONTEXT = 160
_WORDS = ("red", "blue", "green", "black", "white", "pink")


def tiny_configuration(configuration: Configuration, folder: Path) -> tuple[Configuration, Path]:
    """Return the same configuration over tiny models, with few steps and scales, and the folder of its data; both are written if they are missing."""
    models, data = folder / "tiny-models", folder / "tiny-data"
    if not models.is_dir():
        with atomic_directory(models) as written:
            _write_models(written)
    if not data.is_dir():
        with atomic_directory(data) as written:
            for name, write in _WRITERS.items():
                (written / name).mkdir()
                write(written / name)
    settings = {(setting.protocol, setting.adapters): setting for setting in reversed(configuration.settings)}
    few = configuration.pairs[:4]
    small = replace(
        configuration,
        model=str(models / "decoder"),
        encoder=str(models / "encoder"),
        precision="32-true",
        threads=1,
        context_length=CONTEXT,
        tokens_per_batch=2 * CONTEXT,
        calibration_rows=4,
        held_out={"validation": 160, "test": 240},
        scales=(0.5, 1.0),
        few_shot_trials=4,
        instruct=Tuning(8, 3e-3),
        experts={name: Tuning(8, 6e-3, tuning.rows and 40) for name, tuning in configuration.experts.items()},
        adapters=replace(configuration.adapters, rank=2, learning_rate=3e-2),
        settings=tuple(Setting(setting.protocol, few[:2], setting.adapters) for setting in settings.values()),
        pairs=few,
        forgetting=replace(
            configuration.forgetting,
            forgotten=1,
            retained=2,
            tuning=Tuning(12, 6e-3),
            scales=(0.3, 1.0, 3.0),
            answer_tokens=4,
            random_rows=1,
        ),
        continual=replace(configuration.continual, experts=few[:2], scales=(0.5, 1.0), replay=4),
        encoders=replace(
            configuration.encoders, tuning=Tuning(40, 1e-2, 48), attention_rate=1e-2, scored=24, samples=40, grid=(-1.0, 0.0, 1.0)
        ),
    )
    return small, data


def _write_models(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 2 * CONTEXT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=2 * CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "is", "there", *_WORDS, *map(str, range(40))]
        encoder = BertModel(
            BertConfig(
                vocab_size=len(words),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=32,
            )
        )
    decoder.save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    word_level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106 - a token of text
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    given: Any = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    encoder.save_pretrained(folder / "encoder")
    PreTrainedTokenizerFast(tokenizer_object=word_level, model_max_length=32, **given).save_pretrained(folder / "encoder")


# One writer for each data set, in the form in which it is published.


def _gsm8k(folder: Path) -> None:
    for split, first in (("train", 0), ("test", 60)):
        _lines(folder / f"{split}.jsonl", [{"question": f"{n} and {n}?", "answer": f"{2 * n}"} for n in range(first, first + 60)])


def _mbpp(folder: Path) -> None:
    _lines(folder / "mbpp.jsonl", [{"text": f"Add {n}.", "code": f"x + {n}"} for n in range(60)])


def _svamp(folder: Path) -> None:
    rows = [{"Body": f"He has {n}", "Question": "How many?", "Answer": float(n)} for n in range(60)]
    (folder / "SVAMP.json").write_text(json.dumps(rows), "utf-8")


def _tofu(folder: Path) -> None:
    for name, first in (("forget10", 0), ("retain90", 3)):
        rows = [
            {"task_id": "1", "question": f"{number} of {author}?", "answer": f"{_WORDS[(author + number) % 6]} {author}"}
            for author in range(first, first + 3)
            for number in range(20)
        ]
        _lines(folder / f"{name}.jsonl", rows)


def _clinc150(folder: Path) -> None:
    content = {split: [[f"a {_WORDS[n % 4]} {n % 40}", _WORDS[n % 4]] for n in range(80)] for split in ("train", "test")}
    (folder / "data_full.json").write_text(json.dumps(content), "utf-8")


def _banking77(folder: Path) -> None:
    for split in ("train", "test"):
        rows = "".join(f"there is {n % 40} {_WORDS[n % 3]},in_{_WORDS[n % 3]}\n" for n in range(80))
        (folder / f"{split}.csv").write_text("text,category\n" + rows, "utf-8")


def _django(folder: Path) -> None:
    (folder / "all.anno").write_text("".join(f"import module m{n}.\n" for n in range(60)), "utf-8")
    (folder / "all.code").write_text("".join(f"import m{n}\n" for n in range(60)), "utf-8")


def _wikitext2(folder: Path) -> None:
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text("".join(f"The {n}th {split} line of a text .\n" for n in range(600)), "utf-8")


def _books(folder: Path) -> None:
    (folder / "one.txt").write_text("It was the best of times .\n" * 3000, "utf-8")


def _self_instruct(folder: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "instances": [{"input": "", "output": f"{n}"}]} for n in range(60)]
    _lines(folder / "seed_tasks.jsonl", rows)


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


_WRITERS: dict[str, Callable[[Path], None]] = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "svamp": _svamp,
    "tofu": _tofu,
    "clinc150": _clinc150,
    "banking77": _banking77,
    "django": _django,
    "wikitext2": _wikitext2,
    "books": _books,
    "self_instruct": _self_instruct,
}
