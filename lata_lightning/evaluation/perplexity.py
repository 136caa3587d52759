"""How well a model predicts raw text."""

from __future__ import annotations

import math
from typing import Any

import torch

from lata_lightning.errors import LataError


class Perplexity:
    """Perplexity of a text: the exponential of the mean negative log-likelihood of its tokens.

    The text is cut into windows that do not overlap; each is predicted without the ones before it, and its first token
    is not counted. Sums are in float64. For a byte-level tokenizer this is perplexity per byte: its base-2 logarithm is
    bits per byte. The text is turned into tokens once; the object can then be called with many models.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        context_length: int = 128,
        tokens_per_batch: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        """Turn the text into windows.

        Args:
            tokenizer: Hugging Face tokenizer.
            text: What to predict; what does not fill the last window is left out.
            context_length: Tokens of a window, at least 2.
            tokens_per_batch: Most tokens of a batch.
            max_tokens: Use only so many tokens from the start of the text.

        Raises:
            LataError: A number is too small, or the text does not fill one window.
        """
        if context_length < 2 or tokens_per_batch < 1:
            raise LataError(
                f"context_length must be at least 2 and tokens_per_batch at least 1, not {context_length} and {tokens_per_batch}"
            )
        # Not verbose: the text may be longer than the model's context, its windows are not.
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        tokens = torch.tensor(token_ids, dtype=torch.long)
        if len(tokens) < context_length:
            raise LataError(f"the text must fill at least one window of {context_length} tokens, it has {len(tokens)}")
        windows = tokens[: len(tokens) // context_length * context_length].view(-1, context_length)
        self._batches = torch.split(windows, max(1, tokens_per_batch // context_length))
        self.count = windows.shape[0] * (context_length - 1)

    @torch.inference_mode()
    def __call__(self, model: Any) -> float:
        """Perplexity of a model, at least 1; infinite where it overflows. The model stays as it is."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        total = 0.0
        for window in self._batches:
            input_ids = window.to(device)
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
        model.train(was_training)
        try:
            return math.exp(total / self.count)
        except OverflowError:
            return math.inf


def perplexity(model: Any, tokenizer: Any, text: str, context_length: int = 128) -> float:
    """Perplexity of one model on a text, at least 1; see ``Perplexity``, which is faster for many models."""
    return Perplexity(tokenizer, text, context_length)(model)
