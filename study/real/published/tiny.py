"""Tiny models of a configuration's architecture, made in seconds: random, then tuned for a few steps so that there is something to merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lata_lightning.quickstart.corpus import held_out_text
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, SKILLS, Exercise, exercises
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.tokens import chat_rows, collate
from lata_lightning.store.writer import atomic_directory
from study.real.published.configuration import Configuration, empty_model
from study.real.published.scoring import SPLITS, Split, write_texts

CONTEXT = 64
BLOCKS = 4
_HEAD, _WIDTH, _KEY_VALUE_HEADS = 8, 64, 2
_STEPS, _ROWS, _LEARNING_RATE = 12, 16, 2e-3
_TEXT_BYTES = 1024
_PAIRS = {"train": 200, "validation": 16, "test": 24}


def tiny_configuration(configuration: Configuration, folder: Path, seed: int) -> tuple[Configuration, Path]:
    """The same configuration over tiny models, and the folder of their held-out texts; both are written if they are not there yet.

    Args:
        configuration: With the key ``architecture``.
        folder: Where models and texts go.
        seed: Of weights and exercises.

    Raises:
        LataError: The configuration says nothing of the architecture, or transformers does not know it.
    """
    models = folder / "models"
    skills = _skills(configuration)
    if not models.exists():
        with atomic_directory(models) as written:
            _write_models(configuration, skills, written, seed)
    texts = folder / "texts"
    if not texts.exists():
        with atomic_directory(texts) as written:
            write_texts(written, {split: _texts(configuration, skills, split) for split in SPLITS})
    experts = {name: expert._replace(model=str(models / f"expert-{name}")) for name, expert in configuration.experts.items()}
    small = replace(
        configuration,
        base=str(models / "base"),
        instruct=str(models / "instruct"),
        experts=experts,
        dtype="float32",
        context_length=CONTEXT,
    )
    return small, texts


def tiny_architecture(configuration: Configuration, tokenizer: Any) -> dict[str, Any]:
    """The architecture with small sizes: what it ties, caps and normalises and how many heads share keys stays as it is."""
    full = empty_model(configuration).config
    shape = dict(configuration.architecture or {})
    heads = _KEY_VALUE_HEADS * max(1, full.num_attention_heads // full.num_key_value_heads)
    shape |= {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": heads,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "max_position_embeddings": 2 * CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    small = {"head_dim": _HEAD, "query_pre_attn_scalar": _HEAD, "sliding_window": CONTEXT // 2}
    return shape | {key: value for key, value in small.items() if key in shape}


def _write_models(configuration: Configuration, skills: Mapping[str, str], folder: Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(tiny_architecture(configuration, tokenizer))
        _save(model, tokenizer, folder / "base")
        instructions = [pair for skill in INSTRUCT_SKILLS for pair in exercises(skill, "train", _PAIRS["train"] // 4, seed)]
        _tune(model, tokenizer, instructions)
        _save(model, tokenizer, folder / "instruct")
        for name, skill in skills.items():
            expert = type(model).from_pretrained(folder / configuration.start)
            _tune(expert, tokenizer, exercises(skill, "train", _PAIRS["train"], seed))
            _save(expert, tokenizer, folder / f"expert-{name}")


def _model(architecture: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), dtype=torch.float32)


def _tune(model: Any, tokenizer: Any, pairs: Sequence[Exercise]) -> None:
    """A few steps on as many batches of different pairs."""
    rows = chat_rows(tokenizer, pairs, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    model.train()
    for step in range(_STEPS):
        batch = [rows[(step * _ROWS + number) % len(rows)] for number in range(_ROWS)]
        model(**collate(batch, tokenizer.pad_token_id), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _skills(configuration: Configuration) -> dict[str, str]:
    """A skill for every expert to learn, none of the instruct skills as long as there are others."""
    others = [skill for skill in SKILLS if skill not in INSTRUCT_SKILLS]
    return {name: others[number % len(others)] for number, name in enumerate(configuration.experts)}


def _texts(configuration: Configuration, skills: Mapping[str, str], split: Split) -> dict[str, str | Sequence[tuple[str, str]]]:
    begin = SPLITS.index(split) * _TEXT_BYTES
    texts: dict[str, str | Sequence[tuple[str, str]]] = {name: held_out_text()[begin : begin + _TEXT_BYTES] for name in configuration.kept}
    learned = {expert.domain: skills[name] for name, expert in configuration.experts.items()}
    return texts | {domain: exercises(skill, split, _PAIRS[split], 0) for domain, skill in learned.items()}
