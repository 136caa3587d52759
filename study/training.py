"""Models of one small shape, and how they are trained: recipes of several sources of data, in full or as an adapter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning.rows.tokens import TokenRow, chat_rows, collate, raw_tokens
from lata_lightning.training.batches import Batches, MixtureBatchSampler, TokenRows
from lata_lightning.training.module import CausalLMModule
from study.tasks import CONTEXT, Task, tokenizer

Weights = Mapping[str, Tensor]


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


USUAL_SHAPE = Shape()


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


def train(shape: Shape, recipe: Recipe, start: Weights | None, rank: int | None = None) -> dict[str, Tensor]:
    """Train a model of a shape, from random weights if there is no start.

    Args:
        shape: Of the model.
        recipe: How it is trained.
        start: Where it starts.
        rank: Train an adapter of this rank on the start, which stays as it is.

    Returns:
        What was trained, by name of the parameter: all weights, or those of the adapter.
    """
    seed_everything(recipe.seed, verbose=False)
    model: Any = make_model(shape)
    if start is not None:
        load(model, start)
    if rank is not None:
        model = adapted(model, rank)
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
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: LlamaForCausalLM, rank: int) -> Any:
    """The model with LoRA of a rank on every linear layer of its blocks, untrained."""
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks transformers by an older name.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, settings)


@cache
def _chat_rows(pairs: tuple[tuple[str, str], ...]) -> list[TokenRow]:
    return chat_rows(tokenizer(), pairs, CONTEXT)


@cache
def _raw_tokens(texts: tuple[str, ...]) -> Tensor:
    return raw_tokens(tokenizer(), texts, CONTEXT)
