"""The models of a seed: base, instruct, experts and every other fine-tune, each trained once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS
from lata_lightning.rows.tokens import TokenRow, chat_rows, collate, raw_tokens
from lata_lightning.training.batches import Batches, MixtureBatchSampler, TokenRows
from lata_lightning.training.module import CausalLMModule
from study.tasks import (
    CONTEXT,
    SEEN_EXERCISES,
    SKILL_TASKS,
    TASKS,
    Task,
    base_texts,
    self_instruct,
    tokenizer,
    training_exercises,
)

Start = Literal["instruct", "base"]
Weights = Mapping[str, Tensor]

# Optimizer steps and peak learning rate of experts, found on development seed 100: experts are clearly better than their start, and task arithmetic keeps
# most of what they gain, but for skills learned from base, where it keeps little. Arithmetic has few training problems and takes longer.
SKILL_TUNING: dict[Start, dict[str, tuple[int, float]]] = {
    "instruct": {"compute": (350, 7e-4), "other": (300, 5e-4)},
    "base": {"compute": (900, 1e-3), "other": (600, 1e-3)},
}
TEXT_TUNING: dict[Start, tuple[int, float]] = {"instruct": (150, 1.5e-3), "base": (200, 1e-3)}


@dataclass(frozen=True)
class Shape:
    """Size of the models of a seed, and how long base and instruct are trained.

    Attributes:
        blocks: Transformer blocks.
        width: Hidden size, a multiple of 16.
        base_steps: Optimizer steps of pre-training.
        instruct_steps: Optimizer steps from base to instruct.
        tuning: Steps of experts, as a multiple of their recipe's.
    """

    blocks: int = 8
    width: int = 64
    base_steps: int = 1700
    instruct_steps: int = 900
    tuning: float = 1.0

    def __str__(self) -> str:
        return f"{self.blocks}x{self.width}"


@dataclass(frozen=True)
class Part:
    """One source of training batches.

    Attributes:
        share: Share of batches, any positive scale.
        examples: Named groups of (prompt, answer) pairs; none, ``texts`` are read.
        shares: Share of rows of each group; equal shares unless given.
        texts: Documents of raw text.
    """

    share: float
    examples: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    shares: Mapping[str, float] | None = None
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        parts: Where batches come from; every batch is of one part.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        tokens_per_batch: Tokens of a step, padding included.
        weight_decay: Decay of matrices.
        seed: Order of the rows and batches.
    """

    parts: tuple[Part, ...]
    steps: int
    learning_rate: float
    tokens_per_batch: int = 1024
    weight_decay: float = 0.0
    seed: int = 0


class Mixture(LightningDataModule):
    """Batches of several sources in turn, by shares.

    The package's data modules pad a short row to the longest of any group and make tokens of all their texts for every fine-tune; here a batch is of one
    source, and tokens are made once in a process. Rows, order and collation are the package's.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def train_dataloader(self) -> Any:
        """One pass of as many batches as the recipe has steps."""
        shares = [part.share for part in self.recipe.parts]
        return _Interleaved(
            [share / sum(shares) for share in shares], [self._loader(part) for part in self.recipe.parts], self.recipe.steps
        )

    def _loader(self, part: Part) -> DataLoader[Any]:
        groups: list[range] = []
        rows: list[TokenRow] = []
        for pairs in part.examples.values():
            found = _chat_rows(tuple(pairs))
            groups.append(range(len(rows), len(rows) + len(found)))
            rows.extend(found)
        source = TokenRows(rows, _raw_tokens(tuple(part.texts)), CONTEXT)
        sampler = MixtureBatchSampler(
            groups,
            [1.0] * len(groups) if part.shares is None else [part.shares[name] for name in part.examples],
            source.windows,
            raw_share=float(not rows),
            rows_per_batch=max(1, self.recipe.tokens_per_batch // max((len(row.input_ids) for row in rows), default=1)),
            windows_per_batch=max(1, self.recipe.tokens_per_batch // CONTEXT),
            batches=self.recipe.steps,
            seed=self.recipe.seed,
        )
        return DataLoader(Batches(source, tokenizer().pad_token_id), sampler=sampler, batch_size=None)


class _Interleaved:
    def __init__(self, shares: Sequence[float], loaders: Sequence[Any], batches: int) -> None:
        self._shares = shares
        self._loaders = loaders
        self._batches = batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        sources = [iter(loader) for loader in self._loaders]
        given = [0] * len(sources)
        for number in range(1, self._batches + 1):
            # The source that is furthest behind its share.
            chosen = max(range(len(sources)), key=lambda index: number * self._shares[index] - given[index])
            given[chosen] += 1
            yield next(sources[chosen])


class Chain:
    """Base, instruct and experts of one seed, as fp32 tensors on the CPU.

    Args:
        work: Folder of everything trained; the models of this seed and shape lie in a folder of their own in it.
        seed: Of the random weights, the exercises and the order of data.
        shape: Size of the models.
        data: Folder with real text; without one base learns the standard library only, and there is no text track.

    Attributes:
        tokenizer: Of all models.
        seconds: Processor time each model took to train, by key, for those that were asked for.
    """

    def __init__(self, work: Path, seed: int, shape: Shape = Shape(), data: Path | None = None) -> None:
        self.seed, self.shape, self.data = seed, shape, data
        self.folder = Path(work) / f"seed-{seed}-{shape}"
        self.tokenizer = tokenizer()
        self.seconds: dict[str, float] = {}
        self._held: dict[str, dict[str, Tensor]] = {}
        self._model: LlamaForCausalLM | None = None

    def base(self) -> dict[str, Tensor]:
        """The raw language model."""
        texts = base_texts(self.data)
        recipe = Recipe((Part(1.0, texts=texts),), self.shape.base_steps, 4e-3, 2048, 0.1, self.seed)
        return self._kept("base", recipe, None)

    def instruct(self) -> dict[str, Tensor]:
        """Base fine-tuned on the instruct skills in chat format, with instructions of people and raw text between."""
        parts = [Part(0.65, examples=instruct_examples(self.seed)), Part(0.15, texts=base_texts(self.data))]
        if self.data is not None:
            parts.append(Part(0.2, examples={"self_instruct": self_instruct(self.data)}))
        return self._kept("instruct", Recipe(tuple(parts), self.shape.instruct_steps, 2e-3, 1536, 0.0, self.seed), self.base())

    def start(self, start: Start) -> dict[str, Tensor]:
        """Instruct or base."""
        return self.instruct() if start == "instruct" else self.base()

    def expert(self, task: str, start: Start, length: float = 1.0) -> dict[str, Tensor]:
        """The model tuned on one task, from instruct or from base in chat format, for ``length`` times the usual number of steps."""
        recipe = expert_recipe(task, start, self.seed, self.data)
        recipe = replace(recipe, steps=max(1, round(recipe.steps * length * self.shape.tuning)))
        return self.tuned(f"{task}-from-{start}" + ("" if length == 1 else f"-x{length:g}"), self.start(start), recipe)

    def tuned(self, key: str, start: Weights, recipe: Recipe) -> dict[str, Tensor]:
        """Any fine-tune of ``start``; trained unless a model with this key, start and recipe is on disk."""
        return self._kept(key, recipe, start)

    def model(self, weights: Weights) -> LlamaForCausalLM:
        """One model, always the same object, with the weights given; in evaluation mode."""
        if self._model is None:
            self._model = make_model(self.shape).eval()
        load(self._model, weights)
        return self._model

    def _kept(self, key: str, recipe: Recipe, start: Weights | None) -> dict[str, Tensor]:
        digest = _digest(self.shape, recipe, start)
        if f"{key}/{digest}" not in self._held:
            path = self.folder / f"{key}.safetensors"
            found = _read(path, digest)
            if found is None:
                began = time.process_time()
                weights = train(self.shape, recipe, start)
                found = weights, time.process_time() - began
                _write(path, weights, {"digest": digest, "seconds": str(found[1])})
            self._held[f"{key}/{digest}"], self.seconds[key] = found
        return self._held[f"{key}/{digest}"]


def instruct_examples(seed: int) -> dict[str, Sequence[tuple[str, str]]]:
    """Training exercises of every instruct skill, and the few of the skills of the track that instruct has seen."""
    found: dict[str, Sequence[tuple[str, str]]] = {skill: training_exercises(skill, seed) for skill in INSTRUCT_SKILLS}
    return found | {skill: training_exercises(skill, seed)[:SEEN_EXERCISES] for skill in SKILL_TASKS}


def skill_recipe(
    skills: Mapping[str, Sequence[tuple[str, str]]],
    seed: int,
    steps: int,
    *,
    instruct_share: float = 0.35,
    raw_share: float = 0.1,
    learning_rate: float = 1.5e-3,
    data: Path | None = None,
    tokens_per_batch: int = 1024,
    order: int | None = None,
) -> Recipe:
    """Training on some skills, equally, with a share of chat rows that practise the instruct skills again and a share of raw batches.

    Args:
        skills: Training pairs by name.
        seed: Of the exercises that are practised again; that of the chain, so that they are those of instruct.
        steps: Optimizer steps.
        instruct_share: Share of chat rows.
        raw_share: Share of batches.
        learning_rate: Peak learning rate.
        data: The chain's folder with real text.
        tokens_per_batch: Tokens of a step.
        order: Seed of the order of rows; ``seed`` unless given.
    """
    examples: dict[str, Sequence[tuple[str, str]]] = dict(skills)
    shares = dict.fromkeys(skills, (1 - instruct_share) / len(skills))
    if instruct_share:
        again = {skill: pairs for skill, pairs in instruct_examples(seed).items() if skill not in skills}
        examples |= again
        shares |= dict.fromkeys(again, instruct_share / len(again))
    parts = (Part(1 - raw_share, examples=examples, shares=shares), *([Part(raw_share, texts=base_texts(data))] if raw_share else []))
    return Recipe(parts, steps, learning_rate, tokens_per_batch, seed=seed if order is None else order)


def expert_recipe(task: str, start: Start, seed: int, data: Path | None) -> Recipe:
    """How the expert of a task is trained from instruct or from base."""
    own = order_of(task, seed)
    rows = TASKS[task].rows(own)
    if TASKS[task].track == "skills":
        steps, rate = SKILL_TUNING[start].get(task, SKILL_TUNING[start]["other"])
        return skill_recipe({task: rows}, seed, steps, learning_rate=rate, data=data, order=own)
    steps, rate = TEXT_TUNING[start]
    learned = Part(0.6, texts=rows) if TASKS[task].raw else Part(0.6, examples={task: rows})
    replay = (Part(0.25, examples=instruct_examples(seed)), Part(0.15, texts=base_texts(data)))
    return Recipe((learned, *replay), steps, rate, 2048, seed=own)


def batches_of(task: Task, order: int, rows: int) -> list[dict[str, Tensor]]:
    """Some rows of what a task is learned from, as one batch of ``input_ids`` and ``attention_mask``.

    Args:
        task: Whose rows these are.
        order: The seed that the learner's own rows are made by.
        rows: How many.
    """
    found = task.rows(order)
    if task.raw:
        text = _raw_tokens(tuple(found))
        step = len(text) // rows
        taken = [TokenRow(text[number * step :][:CONTEXT].long(), text[number * step :][:CONTEXT].long()) for number in range(rows)]
    else:
        taken = chat_rows(tokenizer(), found[:rows], CONTEXT)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row.input_ids) for row in taken], True, 0)
    return [{"input_ids": collate(taken, tokenizer().pad_token_id)["input_ids"], "attention_mask": mask}]


def order_of(task: str, seed: int) -> int:
    """Seed of the exercises and of the order of rows of one expert; experts of one seed see their data in different orders."""
    return seed * 1000 + 1 + list(TASKS).index(task)


def make_model(shape: Shape) -> LlamaForCausalLM:
    """Untrained Llama of a shape; its random weights depend on torch's global seed."""
    made = tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(made),
            hidden_size=shape.width,
            intermediate_size=shape.width * 8 // 3 // 16 * 16 or 16,
            num_hidden_layers=shape.blocks,
            num_attention_heads=max(1, shape.width // 32),
            num_key_value_heads=max(1, shape.width // 32),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=made.eos_token_id,
            pad_token_id=made.pad_token_id,
        )
    )


@torch.no_grad()
def load(model: LlamaForCausalLM, weights: Weights) -> None:
    """Give a model other weights in place."""
    parameters = dict(model.named_parameters())
    torch._foreach_copy_([parameters[name] for name in parameters], [weights[name] for name in parameters])


def train(shape: Shape, recipe: Recipe, start: Weights | None) -> dict[str, Tensor]:
    """A model of a shape after training, from random weights if there is no start."""
    seed_everything(recipe.seed, verbose=False)
    model = make_model(shape)
    if start is not None:
        load(model, start)
    module = CausalLMModule(
        model, recipe.learning_rate, recipe.weight_decay, warmup_steps=recipe.steps // 20, final_learning_rate_share=0.05
    )
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Of few workers and of no validation.
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=Mixture(recipe))
    logger.setLevel(level)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@cache
def _chat_rows(pairs: tuple[tuple[str, str], ...]) -> list[TokenRow]:
    return chat_rows(tokenizer(), pairs, CONTEXT)


@cache
def _raw_tokens(texts: tuple[str, ...]) -> Tensor:
    return raw_tokens(tokenizer(), texts, CONTEXT)


def _digest(shape: Shape, recipe: Recipe, start: Weights | None) -> str:
    """Of everything that decides what a training gives, but the versions of libraries."""
    found = hashlib.sha256(repr((shape.blocks, shape.width, replace(recipe, parts=()))).encode())
    for part in recipe.parts:
        found.update(repr((part.share, part.examples, part.shares, part.texts)).encode())
    for name, tensor in sorted((start or {}).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def _read(path: Path, digest: str) -> tuple[dict[str, Tensor], float] | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["digest"] != digest:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}, float(metadata["seconds"])  # noqa: SIM118 - not a mapping


def _write(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its final name only when complete.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(weights), partial, metadata)
    partial.replace(path)
