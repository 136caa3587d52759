"""Perplexity of a model on raw text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lata_lightning.errors import LataError
from lata_lightning.evaluation.answers import batches_by_length, perplexity_of, score_of_texts
from lata_lightning.evaluation.intervals import Score
from lata_lightning.evaluation.logits import TokenScores, token_scores
from lata_lightning.evaluation.modes import evaluating
from lata_lightning.rows.tokens import IGNORED, TokenRow, special_tokens, text_windows


class Perplexity:
    """Perplexity of texts: the exponential of the mean negative log-likelihood over all their tokens.

    Texts are predicted independently. A long one is cut into windows that do not overlap, each predicted without the previous ones. A window begins
    with the special tokens that the tokenizer puts before a text, such as BOS, which do not count; if there are none, the first token of a window does
    not count. Sums are in float64. With a byte-level tokenizer this is perplexity per byte: its base-2 logarithm is bits per byte. The texts are turned
    into tokens once; the object can then be called with many models.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | Sequence[str],
        context_length: int = 128,
        tokens_per_batch: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        """Turn the texts into windows.

        Args:
            tokenizer: Hugging Face tokenizer.
            text: One text or several.
            context_length: Largest number of tokens of a window, at least 2.
            tokens_per_batch: Largest number of tokens of a batch, padding included; a longer window is a batch of its own.
            max_tokens: Use only the first so many tokens of each text.

        Raises:
            LataError: A number is too small, or the texts are too short to predict any token.
        """
        if context_length < 2 or tokens_per_batch < 1:
            raise LataError(
                f"context_length must be at least 2 and tokens_per_batch at least 1, not {context_length} and {tokens_per_batch}"
            )
        texts = [text] if isinstance(text, str) else list(text)
        before = len(special_tokens(tokenizer)[0])
        windows = [
            (number, window)
            for number, one in enumerate(texts)
            for window in text_windows(tokenizer, one, context_length, max_tokens=max_tokens)
        ]
        rows = [_row(window, before) for _, window in windows]
        self._text_of = [number for number, _ in windows]
        self.count = sum(int((row.labels[1:] != IGNORED).sum()) for row in rows)
        if not self.count:
            raise LataError(
                f"perplexity needs a text of at least two tokens, or of one where the tokenizer puts BOS before it; none of {len(texts)} texts has them"
            )
        self._batches = batches_by_length(rows, tokens_per_batch)

    def __call__(self, model: Any) -> float:
        """Return the perplexity of a model, at least 1; infinite where it overflows. The model is not changed."""
        with evaluating(model):
            return perplexity_of(scores.losses for _, scores in self._token_scores(model))

    def score(self, model: Any) -> Score:
        """Return the perplexity of a model with the number of texts and an interval."""
        with evaluating(model):
            return score_of_texts(self._text_of, self._token_scores(model))

    def _token_scores(self, model: Any) -> Iterator[tuple[list[int], TokenScores]]:
        device = next(model.parameters()).device
        for members, batch in self._batches:
            yield members, token_scores(model, batch["input_ids"].to(device), batch["labels"].to(device))


def perplexity(model: Any, tokenizer: Any, text: str | Sequence[str], context_length: int = 128) -> float:
    """Return the perplexity of one model on one text or several, at least 1; see ``Perplexity``, which is faster for many models."""
    return Perplexity(tokenizer, text, context_length)(model)


def _row(window: list[int], before: int) -> TokenRow:
    ids = torch.tensor(window)
    return TokenRow(ids, torch.cat([torch.full((before,), IGNORED), ids[before:]]))
