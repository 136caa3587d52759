"""The models of a seed: base, instruct, experts and every other fine-tune, each trained once and kept on disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS
from study.tasks import SEEN_EXERCISES, SKILL_TASKS, TASKS, base_texts, self_instruct, tokenizer, training_exercises
from study.training import USUAL_SHAPE, Part, Recipe, Shape, Weights, adapted, load, make_model, train

Start = Literal["instruct", "base"]

# Optimizer steps and peak learning rate of experts, found on development seed 100: experts are clearly better than their start, and task arithmetic keeps
# most of what they gain, but for skills learned from base, where it keeps little. Arithmetic has few training problems and takes longer.
SKILL_TUNING: dict[Start, dict[str, tuple[int, float]]] = {
    "instruct": {"compute": (350, 7e-4), "other": (300, 5e-4)},
    "base": {"compute": (900, 1e-3), "other": (600, 1e-3)},
}
TEXT_TUNING: dict[Start, tuple[int, float]] = {"instruct": (150, 1.5e-3), "base": (200, 1e-3)}
ADAPTER_TUNING = {"skills": (400, 4e-3), "text": (200, 5e-3)}
"""The same of adapters, by track."""


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

    def __init__(self, work: Path, seed: int, shape: Shape = USUAL_SHAPE, data: Path | None = None) -> None:
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

    def adapter(self, task: str, rank: int) -> Any:
        """The model with an adapter of a rank that was trained on one task, from instruct; wrapped by peft."""
        recipe = expert_recipe(task, "instruct", self.seed, self.data)
        steps, rate = ADAPTER_TUNING[TASKS[task].track]
        recipe = replace(recipe, steps=max(1, round(steps * self.shape.tuning)), learning_rate=rate)
        trained = self._kept(f"{task}-lora-{rank}", recipe, self.instruct(), rank)
        model = make_model(self.shape)
        load(model, self.instruct())
        found = adapted(model, rank).eval()
        found.load_state_dict(trained, strict=False)
        return found

    def tuned(self, key: str, start: Weights, recipe: Recipe) -> dict[str, Tensor]:
        """Any fine-tune of ``start``; trained unless a model with this key, start and recipe is on disk."""
        return self._kept(key, recipe, start)

    def model(self, weights: Weights) -> LlamaForCausalLM:
        """One model, always the same object, with the weights given; in evaluation mode."""
        if self._model is None:
            self._model = make_model(self.shape).eval()
        load(self._model, weights)
        return self._model

    def _kept(self, key: str, recipe: Recipe, start: Weights | None, rank: int | None = None) -> dict[str, Tensor]:
        digest = _digest(self.shape, recipe, start) + ("" if rank is None else f"-{rank}")
        if f"{key}/{digest}" not in self._held:
            path = self.folder / f"{key}.safetensors"
            found = _read(path, digest)
            if found is None:
                began = time.process_time()
                weights = train(self.shape, recipe, start, rank)
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


def order_of(task: str, seed: int) -> int:
    """Seed of the exercises and of the order of rows of one expert; experts of one seed see their data in different orders."""
    return seed * 1000 + 1 + list(TASKS).index(task)


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
