"""Exact match of short answers, by one forward pass instead of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError

IGNORED = -100


class ExactMatch:
    """Share of questions a model answers exactly, end of turn included.

    A question counts if, with the right answer fed in, the most likely next token is the right one at every place of
    the answer and at the token that ends the turn. Greedy generation takes the same steps for as long as it is right,
    so this equals exact match under greedy generation, for one forward pass a batch. The questions are turned into
    tokens once; the object can then be called with many models.

    Padding is on the right, where causal attention does not see it.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[tuple[str, str]], tokens_per_batch: int = 4096) -> None:
        """Turn the questions into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer with a chat template and an end token.
            pairs: (prompt, answer) pairs, at least one.
            tokens_per_batch: Most tokens of a batch, padding included; a longer row is a batch of its own.

        Raises:
            LataError: There are no pairs, or ``tokens_per_batch`` is not positive.
        """
        if not pairs or tokens_per_batch < 1:
            raise LataError(f"exact match needs at least one pair and one token a batch, not {len(pairs)} and {tokens_per_batch}")
        rows = [_row(tokenizer, prompt, answer) for prompt, answer in pairs]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        self.count = len(rows)
        self._batches: list[tuple[list[int], Tensor, Tensor]] = []
        members: list[int] = []
        for index in order:
            if members and (len(members) + 1) * len(rows[index][0]) > tokens_per_batch:
                self._batches.append(_batch(rows, members))
                members = []
            members.append(index)
        self._batches.append(_batch(rows, members))

    @torch.inference_mode()
    def matches(self, model: Any) -> list[bool]:
        """Whether each question is answered exactly, in the order of the pairs; the model stays as it is."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        found = [False] * self.count
        for members, input_ids, labels in self._batches:
            logits = model(input_ids=input_ids.to(device), use_cache=False).logits[:, :-1]
            wanted = labels[:, 1:].to(device)
            right = ((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(-1)
            for index, match in zip(members, right.tolist(), strict=True):
                found[index] = match
        model.train(was_training)
        return found

    def __call__(self, model: Any) -> float:
        """Exact match of a model, in [0, 1]."""
        return sum(self.matches(model)) / self.count


def exact_match(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> float:
    """Exact match of one model on some pairs, in [0, 1]; see ``ExactMatch``, which is faster for many models."""
    return ExactMatch(tokenizer, pairs)(model)


def _row(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    question = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    head = tokenizer(question, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return head + tail, [IGNORED] * len(head) + tail


def _batch(rows: list[tuple[list[int], list[int]]], members: list[int]) -> tuple[list[int], Tensor, Tensor]:
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[index][side]) for index in members], True, padding)
        for side, padding in ((0, 0), (1, IGNORED))
    )
    return members, input_ids, labels
