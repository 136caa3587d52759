"""Exact match of short answers, from one forward pass instead of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.intervals import Score, share
from lata_lightning.rows.schema import Sample
from lata_lightning.rows.tokens import Template


class ExactMatch:
    """Share of questions that a model answers exactly, end of turn included.

    The model reads the question and its right answer. The question counts if at every position of the answer, and at the token that ends the turn, the
    most likely next token is the right one. This equals exact match under greedy generation, at the cost of one forward pass per batch. The questions
    are turned into tokens once; the object can then be called with many models.
    """

    def __init__(
        self, tokenizer: Any, pairs: Sequence[tuple[str, str] | Sample], tokens_per_batch: int = 4096, *, template: Template = "chat"
    ) -> None:
        """Turn the questions into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer with an end token, and with a chat template unless ``template`` is ``plain``.
            pairs: (prompt, answer) pairs or samples, at least one. In a conversation every turn of the assistant must be right.
            tokens_per_batch: Largest number of tokens of a batch, padding included; a longer row is a batch of its own.
            template: ``plain`` puts the answer of a pair directly after its prompt.

        Raises:
            LataError: There are no pairs, ``tokens_per_batch`` is not positive, or a row does not fit the tokenizer.
        """
        self._answers = Answers(tokenizer, pairs, tokens_per_batch, template=template)
        self.count = self._answers.count

    def matches(self, model: Any) -> list[bool]:
        """Return whether each question is answered exactly, in the order of the pairs; the model is not changed."""
        exact = [True] * self.count
        for members, tokens in self._answers.token_scores(model):
            for row in tokens.rows[~tokens.hits].tolist():
                exact[members[row]] = False
        return exact

    def __call__(self, model: Any) -> float:
        """Return the exact match of a model, in [0, 1]."""
        return self.score(model).value

    def score(self, model: Any) -> Score:
        """Return the exact match of a model with the number of questions and an interval."""
        return share(self.matches(model))


def exact_match(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> float:
    """Return the exact match of one model on some pairs, in [0, 1]; see ``ExactMatch``, which is faster for many models."""
    return ExactMatch(tokenizer, pairs)(model)
