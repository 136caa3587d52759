"""The fine-tunes of the quickstart, from instruct to each expert.

All four take about two minutes on one CPU core. Experts also train on the instruct skills and on raw text. Without that they would forget these, and a
merge of two experts would not be better than either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoTokenizer

from lata_lightning.errors import LataError
from lata_lightning.quickstart.corpus import replay_text
from lata_lightning.quickstart.exercises import (
    INSTRUCT_SKILLS,
    MATH_SKILL,
    STRING_SKILL,
    UNWANTED_SKILL,
    Exercise,
    exercises,
)
from lata_lightning.rows.tokens import chat_rows
from lata_lightning.training.data import ChatDataModule
from lata_lightning.training.module import CausalLMModule

INSTRUCT = Path(__file__).parent / "checkpoints" / "instruct"
BASE = Path(__file__).parent / "checkpoints" / "base"
TRAIN_EXERCISES_PER_SKILL = 4_000
# compute has 1 620 problems in all, about half of them for training; next and larger have a few thousand.
EXPERT_EXERCISES_BY_SKILL = {"compute": 780, "next": 3_000}


@dataclass(frozen=True)
class Expert:
    """One fine-tune of the quickstart.

    Attributes:
        skills: The skills to learn; they share the chat rows that are not replay equally.
        instruct_share: Share of chat rows that replay the instruct skills, equally.
        raw_share: Share of batches that are raw text.
        learning_rate: Peak learning rate.
        epochs: Number of epochs; the callback measures at the end of each.
        batches_per_epoch: Optimizer steps per epoch.
        tokens_per_batch: Tokens per step, padding included.
        seed: Seed of the exercises and their order.
    """

    skills: tuple[str, ...]
    instruct_share: float = 0.35
    raw_share: float = 0.1
    learning_rate: float = 1.5e-3
    epochs: int = 4
    batches_per_epoch: int = 75
    tokens_per_batch: int = 1024
    seed: int = 0


# The target of forgetting has learned the unwanted skill together with one to keep. The vector that is subtracted comes from a separate fine-tune on other
# exercises, as for somebody who has only the target.
EXPERTS: dict[str, Expert] = {
    "math": Expert((MATH_SKILL,), seed=1),
    "string": Expert((STRING_SKILL,), batches_per_epoch=50, seed=2),
    "unwanted": Expert((UNWANTED_SKILL,), batches_per_epoch=50, seed=3),
    "target": Expert((STRING_SKILL, UNWANTED_SKILL), batches_per_epoch=70, seed=4),
}


class FineTune(NamedTuple):
    """Arguments of `Trainer(**trainer).fit(module, datamodule=data)`."""

    module: CausalLMModule
    data: ChatDataModule
    trainer: dict[str, Any]


def fine_tune(name: str, instruct: Path = INSTRUCT, table: dict[str, Expert] | None = None) -> FineTune:
    """Return module, data and Trainer arguments of one expert.

    Args:
        name: A key of ``EXPERTS``.
        instruct: Hugging Face directory of the instruct model; by default the shipped one.
        table: Settings in place of ``EXPERTS``.

    Raises:
        LataError: There is no such expert.
        SourceError: ``instruct`` cannot be loaded.
    """
    table = EXPERTS if table is None else table
    if name not in table:
        raise LataError(f"unknown expert {name!r}; the experts are {', '.join(table)}")
    expert = table[name]
    steps = expert.epochs * expert.batches_per_epoch
    module = CausalLMModule(str(instruct), expert.learning_rate, weight_decay=0.0, warmup_steps=steps // 20)
    shares = dict.fromkeys(INSTRUCT_SKILLS, expert.instruct_share / len(INSTRUCT_SKILLS))
    shares |= dict.fromkeys(expert.skills, (1 - expert.instruct_share) / len(expert.skills))
    data = ChatDataModule(
        AutoTokenizer.from_pretrained(instruct),
        {skill: training_exercises(skill, expert.seed) for skill in shares},
        shares,
        raw_texts=[replay_text()],
        raw_share=expert.raw_share,
        batches_per_epoch=expert.batches_per_epoch,
        tokens_per_batch=expert.tokens_per_batch,
        seed=expert.seed,
    )
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": expert.epochs,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return FineTune(module, data, trainer)


def training_samples(name: str, tokenizer: Any, count: int, table: Mapping[str, Expert] | None = None) -> list[dict[str, Tensor]]:
    """Return some training exercises of an expert's own skills, each as a batch of one row: ``input_ids`` of shape (1, tokens).

    Args:
        name: A key of ``EXPERTS``.
        tokenizer: Tokenizer of the models.
        count: Number of exercises of each skill.
        table: Settings in place of ``EXPERTS``.
    """
    expert = (EXPERTS if table is None else table)[name]
    pairs = [pair for skill in expert.skills for pair in training_exercises(skill, expert.seed)[:count]]
    return [{"input_ids": row.input_ids[None]} for row in chat_rows(tokenizer, pairs, tokenizer.model_max_length)]


def training_exercises(skill: str, seed: int) -> list[Exercise]:
    """Return the training exercises of a skill that an expert sees."""
    return exercises(skill, "train", EXPERT_EXERCISES_BY_SKILL.get(skill, TRAIN_EXERCISES_PER_SKILL), seed)
