"""Questions with known answers: how likely a model finds the answers, token by token, in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.evaluation.logits import TokenScores, token_scores
from lata_lightning.evaluation.modes import evaluating
from lata_lightning.rows.schema import Sample, pair
from lata_lightning.rows.tokens import IGNORED, Row, Template, check_chat_template, collate, conversation_row


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
    """Conversations and their answers as batches of tokens, prepared once for many models.

    What is scored are the tokens of every turn of the assistant up to the one that ends the turn. Padding is on the right, where causal attention does
    not see it.
    """

    def __init__(
        self, tokenizer: Any, pairs: Sequence[tuple[str, str] | Sample], tokens_per_batch: int = 4096, *, template: Template = "chat"
    ) -> None:
        """Turn the conversations into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer with an end token, and with a chat template unless ``template`` is ``plain``.
            pairs: (prompt, answer) pairs or samples, at least one.
            tokens_per_batch: Most tokens of a batch, padding included; a longer row is a batch of its own.
            template: ``plain`` puts the answer of a pair straight after its prompt.

        Raises:
            LataError: There are no pairs, ``tokens_per_batch`` is not positive, or a row does not fit the tokenizer (see ``conversation_row``).
        """
        if not pairs or tokens_per_batch < 1:
            raise LataError(f"answers need at least one pair and one token a batch, not {len(pairs)} and {tokens_per_batch}")
        samples = [one if isinstance(one, Sample) else pair(*one) for one in pairs]
        rows = [answer_row(tokenizer, sample, f"row {number}", template) for number, sample in enumerate(samples, start=1)]
        self.count = len(rows)
        self._batches = batches_by_length(rows, tokens_per_batch)

    def token_scores(self, model: Any) -> Iterator[tuple[list[int], TokenScores]]:
        """Numbers of the pairs of a batch, and the scores of their answers' tokens; batch by batch."""
        device = next(model.parameters()).device
        for members, batch in self._batches:
            # The modes end before the generator is left: whoever asks for the next batch must not run in them.
            with evaluating(model):
                found = token_scores(model, batch["input_ids"].to(device), batch["labels"].to(device))
            yield members, found

    def scores(self, model: Any) -> list[AnswerScore]:
        """The score of each answer, in the order of the pairs; the model stays as it is."""
        found: dict[int, AnswerScore] = {}
        for members, tokens in self.token_scores(model):
            for row, index in enumerate(members):
                own = tokens.rows == row
                found[index] = AnswerScore(float(tokens.losses[own].mean()), tuple(tokens.hits[own].tolist()))
        return [found[index] for index in range(self.count)]


class AnswerPerplexity:
    """Perplexity of answers: the exponential of the mean negative log-likelihood of all their tokens, ends of turns included.

    For skills that a model is too small to answer exactly. The answers are turned into tokens once; the object can then be called with many models.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template, unless ``template`` is ``plain``.
        pairs: (prompt, answer) pairs or samples, at least one.
        template: ``plain`` puts the answer of a pair straight after its prompt.

    Raises:
        LataError: There are no pairs, or a row does not fit the tokenizer.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[tuple[str, str] | Sample], *, template: Template = "chat") -> None:
        self._answers = Answers(tokenizer, pairs, template=template)

    def __call__(self, model: Any) -> float:
        """Perplexity of a model, at least 1; infinite where it overflows. The model stays as it is."""
        return perplexity_of(tokens.losses for _, tokens in self._answers.token_scores(model))


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
                eos_token_id=_turn_ends(model, tokenizer),
            )
            found += tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def perplexity_of(losses: Iterable[Tensor]) -> float:
    """The exponential of the mean of some losses, every one of which weighs the same; infinite where it overflows.

    Args:
        losses: Negative log-likelihoods in nats, float64, in pieces of shape (tokens,).
    """
    total, count = 0.0, 0
    for piece in losses:
        total, count = total + piece.sum().item(), count + len(piece)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def answer_row(tokenizer: Any, sample: Sample, where: str, template: Template = "chat") -> Row:
    """A conversation as a row for training has it, labelled up to the token that ends each turn.

    What a chat template puts after that token, such as a line break, no model has to say. Where a template ends the last turn with no special token, the
    end token is put there.

    Args:
        tokenizer: Hugging Face tokenizer with an end token.
        sample: A conversation or a pair.
        where: Which row it is, for messages.
        template: ``plain`` puts the answer of a pair straight after its prompt.

    Raises:
        LataError: As for ``conversation_row``.
    """
    row = conversation_row(tokenizer, sample, where, template)
    ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids, labels, ended = row.input_ids.tolist(), row.labels.tolist(), [False] * len(row.labels)
    for begin, end in _runs(labels):
        last = max((position for position in range(begin, end) if ids[position] in ends), default=end)
        # Text after the last special token is no formatting: then that token is part of the answer and does not end the turn.
        if last < end and not tokenizer.decode(ids[last + 1 : end]).strip():
            ended[last] = True
            labels[last + 1 : end] = [IGNORED] * (end - last - 1)
    length = max(position for position, label in enumerate(labels) if label != IGNORED) + 1
    ids, labels = ids[:length], labels[:length]
    if not ended[length - 1]:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return Row(torch.tensor(ids), torch.tensor(labels))


def batches_by_length(rows: Sequence[Row], tokens_per_batch: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Rows as batches of similar length, shortest first, with the numbers of their rows.

    Args:
        rows: Any number.
        tokens_per_batch: Most tokens of a batch, padding included; a longer row is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids)):
        if not batches or (len(batches[-1]) + 1) * len(rows[index].input_ids) > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return [(members, collate([rows[index] for index in members], 0)) for members in batches]


def _turn_ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens at which generation stops: the tokenizer's end token, and those that the model's own settings name."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of every run of tokens that are learned."""
    runs: list[tuple[int, int]] = []
    for position, label in enumerate(labels):
        if label == IGNORED:
            continue
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def _question(tokenizer: Any, prompt: str) -> str:
    check_chat_template(tokenizer)
    return str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
