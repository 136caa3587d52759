"""Questions with known answers: how likely a model finds them, token by token, in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lata_lightning.errors import LataError

IGNORED = -100


class AnswerScore(NamedTuple):
    """What a model makes of one answer that is fed in.

    Attributes:
        loss: Mean negative log-likelihood of its tokens, the token that ends the turn included, in nats.
        hits: For each token, that one included, whether it was the most likely one.
    """

    loss: float
    hits: tuple[bool, ...]

    @property
    def probability(self) -> float:
        """Probability of the answer, by the geometric mean over its tokens: in [0, 1]."""
        return math.exp(-self.loss)


class Answers:
    """Questions and their answers as batches of tokens, prepared once for many models.

    Padding is on the right, where causal attention does not see it.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[tuple[str, str]], tokens_per_batch: int = 4096) -> None:
        """Turn the questions into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer with a chat template and an end token.
            pairs: (prompt, answer) pairs, at least one.
            tokens_per_batch: Most tokens of a batch, padding included; a longer row is a batch of its own.

        Raises:
            LataError: There are no pairs, ``tokens_per_batch`` is not positive, or the tokenizer has no chat template.
        """
        if not pairs or tokens_per_batch < 1:
            raise LataError(f"answers need at least one pair and one token a batch, not {len(pairs)} and {tokens_per_batch}")
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

    def predictions(self, model: Any) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers of some pairs, the model's logits of shape (pairs, tokens, vocabulary) and the tokens wanted, -100 where none is; batch by batch."""
        device = next(model.parameters()).device
        for members, input_ids, labels in self._batches:
            # The modes end before the generator is left: whoever asks for the next batch must not run in them.
            with evaluating(model):
                logits = model(input_ids=input_ids.to(device), use_cache=False).logits[:, :-1]
            yield members, logits, labels[:, 1:].to(device)

    def scores(self, model: Any) -> list[AnswerScore]:
        """The score of each answer, in the order of the pairs; the model stays as it is."""
        found: dict[int, AnswerScore] = {}
        for members, logits, wanted in self.predictions(model):
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
            ).double()
            hits, answer = logits.argmax(-1) == wanted, wanted != IGNORED
            for row, index in enumerate(members):
                found[index] = AnswerScore(float(losses[row][answer[row]].mean()), tuple(hits[row][answer[row]].tolist()))
        return [found[index] for index in range(self.count)]


class AnswerPerplexity:
    """Perplexity of answers: the exponential of the mean negative log-likelihood of all their tokens, ends of turns included.

    For skills that a model is too small to answer exactly. The answers are turned into tokens once; the object can then be called with many models.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template and an end token.
        pairs: (prompt, answer) pairs, at least one.

    Raises:
        LataError: There are no pairs, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> None:
        self._answers = Answers(tokenizer, pairs)

    def __call__(self, model: Any) -> float:
        """Perplexity of a model, at least 1; infinite where it overflows. The model stays as it is."""
        scores = self._answers.scores(model)
        mean = sum(score.loss * len(score.hits) for score in scores) / sum(len(score.hits) for score in scores)
        try:
            return math.exp(mean)
        except OverflowError:
            return math.inf


def generated(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 200, rows_per_batch: int = 16) -> list[str]:
    """What a model answers by greedy generation, without special tokens, in the order of the prompts.

    Args:
        model: Hugging Face causal language model; it stays as it is.
        tokenizer: With a chat template and an end token.
        prompts: Questions.
        max_new_tokens: Most tokens of an answer.
        rows_per_batch: Prompts answered at once.

    Raises:
        LataError: The tokenizer has no chat template.
    """
    questions = [_question(tokenizer, prompt) for prompt in prompts]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for begin in range(0, len(questions), rows_per_batch):
            rows = [
                torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"])
                for question in questions[begin : begin + rows_per_batch]
            ]
            # On the left, so that every answer begins where its question ends.
            input_ids, mask = (
                torch.nn.utils.rnn.pad_sequence(side, True, value, padding_side="left").to(device)
                for side, value in ((rows, padding), ([torch.ones_like(row) for row in rows], 0))
            )
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                eos_token_id=tokenizer.eos_token_id,
            )
            found += tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model has the mode it had."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _question(tokenizer: Any, prompt: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise LataError(
            "questions are asked in the tokenizer's chat format, and this tokenizer has no chat template. Copy chat_template.jinja from the instruct "
            "model into the directory, or score raw text (rows with a 'text')."
        )
    return str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))


def _row(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    head = tokenizer(_question(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return head + tail, [IGNORED] * len(head) + tail


def _batch(rows: list[tuple[list[int], list[int]]], members: list[int]) -> tuple[list[int], Tensor, Tensor]:
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[index][side]) for index in members], True, padding)
        for side, padding in ((0, 0), (1, IGNORED))
    )
    return members, input_ids, labels
