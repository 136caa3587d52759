"""Scoring known answers token by token in one forward pass, and generating answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lata_lightning.errors import LataError
from lata_lightning.evaluation.intervals import Score, perplexity_score
from lata_lightning.evaluation.logits import TokenScores, token_scores
from lata_lightning.evaluation.modes import evaluating
from lata_lightning.rows.schema import Sample, pair
from lata_lightning.rows.tokens import IGNORED, Template, TokenRow, check_chat_template, collate, conversation_row


class AnswerScore(NamedTuple):
    """Score of one answer that a model reads.

    Attributes:
        loss: Mean negative log-likelihood, in nats, of its tokens and the token that ends the turn.
        hits: Whether each of these tokens was the most likely one.
    """

    loss: float
    hits: tuple[bool, ...]

    @property
    def probability(self) -> float:
        """Geometric mean of the probabilities of its tokens, in [0, 1]."""
        return math.exp(-self.loss)


class Answers:
    """Questions and answers as batches of tokens, prepared once for many models.

    The tokens of every turn of the assistant are scored, up to the one that ends the turn. Padding is on the right, where causal attention does not see
    it.
    """

    def __init__(
        self, tokenizer: Any, pairs: Sequence[tuple[str, str] | Sample], tokens_per_batch: int = 4096, *, template: Template = "chat"
    ) -> None:
        """Turn the conversations into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer with an end token, and with a chat template unless ``template`` is ``plain``.
            pairs: (prompt, answer) pairs or samples, at least one.
            tokens_per_batch: Largest number of tokens of a batch, padding included; a longer row is a batch of its own.
            template: ``plain`` puts the answer of a pair directly after its prompt.

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
        """Yield, batch by batch, the numbers of the pairs and the scores of the tokens of their answers."""
        device = next(model.parameters()).device
        for members, batch in self._batches:
            # The context ends before the yield, so that the caller's code does not run in it.
            with evaluating(model):
                scores = token_scores(model, batch["input_ids"].to(device), batch["labels"].to(device))
            yield members, scores

    def scores(self, model: Any) -> list[AnswerScore]:
        """Return the score of each answer, in the order of the pairs; the model is not changed."""
        scores: dict[int, AnswerScore] = {}
        for members, tokens in self.token_scores(model):
            for row, index in enumerate(members):
                own = tokens.rows == row
                scores[index] = AnswerScore(float(tokens.losses[own].mean()), tuple(tokens.hits[own].tolist()))
        return [scores[index] for index in range(self.count)]


class AnswerPerplexity:
    """Perplexity of answers: the exponential of the mean negative log-likelihood of all their tokens, including those that end the turns.

    For skills that a model is too small to answer exactly. The answers are turned into tokens once; the object can then be called with many models.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template, unless ``template`` is ``plain``.
        pairs: (prompt, answer) pairs or samples, at least one.
        template: ``plain`` puts the answer of a pair directly after its prompt.

    Raises:
        LataError: There are no pairs, or a row does not fit the tokenizer.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[tuple[str, str] | Sample], *, template: Template = "chat") -> None:
        self._answers = Answers(tokenizer, pairs, template=template)

    def __call__(self, model: Any) -> float:
        """Return the perplexity of a model, at least 1; infinite where it overflows. The model is not changed."""
        return perplexity_of(tokens.losses for _, tokens in self._answers.token_scores(model))

    def score(self, model: Any) -> Score:
        """Return the perplexity of a model with the number of conversations and an interval."""
        return score_of_texts(range(self._answers.count), self._answers.token_scores(model))


def generated(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 200, rows_per_batch: int = 16) -> list[str]:
    """Generate answers greedily; returns them without special tokens, in the order of the prompts.

    Args:
        model: Hugging Face causal language model; it is not changed.
        tokenizer: Tokenizer with a chat template and an end token.
        prompts: Questions.
        max_new_tokens: Largest number of tokens of an answer.
        rows_per_batch: Number of prompts per batch.

    Raises:
        LataError: The tokenizer has no chat template.
    """
    questions = [_question(tokenizer, prompt) for prompt in prompts]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(model.parameters()).device
    answers = []
    with evaluating(model):
        for begin in range(0, len(questions), rows_per_batch):
            rows = [
                torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"])
                for question in questions[begin : begin + rows_per_batch]
            ]
            # Padding is on the left, so that every answer begins where its question ends.
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
            answers += tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def perplexity_of(losses: Iterable[Tensor]) -> float:
    """Return the exponential of the mean loss per token; infinite where it overflows.

    Args:
        losses: Negative log-likelihoods in nats, float64, as tensors of shape (tokens,).
    """
    total, count = 0.0, 0
    for batch in losses:
        total, count = total + batch.sum().item(), count + len(batch)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def score_of_texts(text_of: Sequence[int], batches: Iterable[tuple[list[int], TokenScores]]) -> Score:
    """Return the perplexity over all tokens, with an interval over texts.

    Args:
        text_of: Number of the text that each row belongs to.
        batches: Numbers of the rows of a batch, and the scores of their tokens.
    """
    losses, tokens = dict.fromkeys(text_of, 0.0), dict.fromkeys(text_of, 0)
    for members, scores in batches:
        for row, loss in zip(scores.rows.tolist(), scores.losses.tolist(), strict=True):
            text = text_of[members[row]]
            losses[text] += loss
            tokens[text] += 1
    scored = [text for text, count in tokens.items() if count]
    return perplexity_score([losses[text] for text in scored], [tokens[text] for text in scored])


def answer_row(tokenizer: Any, sample: Sample, where: str, template: Template = "chat") -> TokenRow:
    """Turn a conversation into tokens as for training, but labelled only up to the token that ends each turn.

    What a chat template puts after that token, such as a line break, is not scored. Where a template ends the last turn without a special token, the end
    token is appended.

    Args:
        tokenizer: Hugging Face tokenizer with an end token.
        sample: A conversation or a pair.
        where: Which row it is, for messages.
        template: ``plain`` puts the answer of a pair directly after its prompt.

    Raises:
        LataError: As for ``conversation_row``.
    """
    row = conversation_row(tokenizer, sample, where, template)
    ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids, labels, ended = row.input_ids.tolist(), row.labels.tolist(), [False] * len(row.labels)
    for begin, end in _runs(labels):
        last = max((position for position in range(begin, end) if ids[position] in ends), default=end)
        # If text follows the last special token, that token is part of the answer and does not end the turn.
        if last < end and not tokenizer.decode(ids[last + 1 : end]).strip():
            ended[last] = True
            labels[last + 1 : end] = [IGNORED] * (end - last - 1)
    length = max(position for position, label in enumerate(labels) if label != IGNORED) + 1
    ids, labels = ids[:length], labels[:length]
    if not ended[length - 1]:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return TokenRow(torch.tensor(ids), torch.tensor(labels))


def batches_by_length(rows: Sequence[TokenRow], tokens_per_batch: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Return rows as batches of similar length, shortest first, each with the numbers of its rows.

    Args:
        rows: Any number.
        tokens_per_batch: As for ``groups_by_length``.
    """
    groups = groups_by_length([len(row.input_ids) for row in rows], tokens_per_batch)
    return [(members, collate([rows[index] for index in members], 0)) for members in groups]


def groups_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group rows of similar length, shortest first; returns the numbers of the rows of each group.

    Args:
        lengths: Number of tokens of each row.
        tokens_per_batch: Largest number of tokens of a group, padding included; a longer row is a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > tokens_per_batch:
            groups.append([])
        groups[-1].append(index)
    return groups


def _turn_ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens at which generation stops: the tokenizer's end token, and those of the model's generation config."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return begin and end of every run of labelled tokens."""
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
