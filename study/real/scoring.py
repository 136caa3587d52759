"""How a model is scored: the loss of held-out answers and texts, exact match of short answers, and what a merge keeps of the experts' gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.evaluation.scales import Reweighting
from lata_lightning.merging.term import Term
from lata_lightning.rows.schema import Sample
from lata_lightning.training.loading import load_causal_lm
from lata_lightning.vectors.task_vector import TaskVector
from study.real.data import DATA_SETS
from study.real.tuning import FineTunes

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
INSTRUCTIONS, TEXT = "self_instruct", "wikitext2"
"""What no expert is tuned on, as a measure of what else is kept: instructions of people, and text."""


class Score(NamedTuple):
    """What a model makes of one data set.

    Attributes:
        loss: Mean negative log-likelihood in nats per token, of answers or of all text.
        exact: Share of the answers given exactly, in [0, 1]; None where answers are long.
    """

    loss: float
    exact: float | None


class HeldOut:
    """Scores of models on held-out rows, which are turned into tokens once.

    Args:
        models: Whose rows and tokenizer these are.
    """

    def __init__(self, models: FineTunes) -> None:
        self._models = models
        self._prepared: dict[tuple[str, Split], Answers | Perplexity] = {}

    def __call__(self, model: Any, name: str, split: Split) -> Score:
        """Return the score of a model on a data set.

        Raises:
            LataError: The loss is not a finite number.
        """
        with autocast(self._models.configuration.precision):
            scored = self._scored(model, name, split)
        if not math.isfinite(scored.loss):
            raise LataError(f"the loss on {name} must be a finite number, it is {scored.loss}. Take smaller scales.")
        return scored

    def _scored(self, model: Any, name: str, split: Split) -> Score:
        if (name, split) not in self._prepared:
            self._prepared[name, split] = self._prepare(name, split)
        prepared = self._prepared[name, split]
        if isinstance(prepared, Perplexity):
            return Score(math.log(prepared(model)), None)
        total, count, exact = 0.0, 0, [True] * prepared.count
        for members, tokens in prepared.token_scores(model):
            total, count = total + float(tokens.losses.sum()), count + len(tokens.losses)
            for row in tokens.rows[~tokens.hits].tolist():
                exact[members[row]] = False
        return Score(total / count, sum(exact) / len(exact) if DATA_SETS[name].short else None)

    def _prepare(self, name: str, split: Split) -> Answers | Perplexity:
        rows = self._models.rows(name)
        samples = rows.validation if split == "validation" else rows.test
        configuration, tokenizer = self._models.configuration, self._models.tokenizer
        most = configuration.held_out[split]
        if samples[0].form == "text":
            return Perplexity(tokenizer, "".join(sample.text for sample in samples), configuration.context_length, max_tokens=most)
        return Answers(tokenizer, first_tokens(samples, tokenizer, most))


class Bench:
    """One model in memory whose weights are set to its own plus scale · vector, again and again.

    Args:
        onto: Directory of the model.
    """

    def __init__(self, onto: Path) -> None:
        self.onto = onto

    @cached_property
    def _loaded(self) -> tuple[Any, Reweighting]:
        # The callback stores float32, and so does the model: what is rounded is what a merge would round.
        model = load_causal_lm(str(self.onto)).eval()
        return model, Reweighting(model)

    def at(self, terms: Sequence[Term]) -> Any:
        """Return the model with the terms added, always the same object."""
        model, weights = self._loaded
        weights.apply(terms)
        return model

    def plus(self, vector: TaskVector, scale: float) -> Any:
        """Return the model plus scale · vector."""
        return self.at([Term(vector, scale)] if scale else [])


class Gains:
    """What experts gain over the model that a merge is compared with, and what merges keep of it.

    Args:
        before, after: Loss of the start, and of each expert, on its own data set.

    Raises:
        LataError: An expert is no better on its own data set than the start.
    """

    def __init__(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.before, self.after = before, after
        useless = [name for name in after if after[name] >= before[name]]
        if useless:
            raise LataError(
                f"every expert must be better on its own data set than its start; these are not: {first_three(useless)}. Train them longer."
            )

    def kept(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the share of each expert's gain that a model keeps: 0 at the start, 1 at the expert."""
        return {name: (self.before[name] - losses[name]) / (self.before[name] - self.after[name]) for name in self.after}

    def score(self, losses: Mapping[str, float]) -> float:
        """Return the mean of these shares."""
        shares = self.kept(losses).values()
        return sum(shares) / len(shares)


def losses(held_out: HeldOut, model: Any, names: Sequence[str], split: Split) -> dict[str, float]:
    """Return the loss of a model on some data sets."""
    return {name: held_out(model, name, split).loss for name in names}


def details(held_out: HeldOut, model: Any, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return loss and exact match on test of some data sets, of instructions and of text, for JSON."""
    wanted = dict.fromkeys((*names, INSTRUCTIONS, TEXT))
    return {name: cast("dict[str, float | None]", held_out(model, name, "test")._asdict()) for name in wanted}


def first_tokens(samples: Sequence[Sample], tokenizer: Any, most: int) -> list[Sample]:
    """Return the first conversations whose questions and answers have about so many tokens together, at least one."""
    taken, tokens = [], 0
    for sample in samples:
        if tokens >= most:
            break
        taken.append(sample)
        tokens += len(tokenizer(sample.prompt + sample.answer, add_special_tokens=False, verbose=False)["input_ids"])
    return taken


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Return a context in which models run in the precision that Lightning's Trainer was given."""
    if not precision.endswith("-mixed"):
        return nullcontext()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16 if precision.startswith("bf16") else torch.float16)
