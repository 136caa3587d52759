"""Accuracy of text classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.answers import groups_by_length
from lata_lightning.evaluation.intervals import Score, share
from lata_lightning.evaluation.modes import evaluating
from lata_lightning.rows.schema import Sample


class Accuracy:
    """Share of texts to which a classifier gives the right label.

    Texts are tokenised by ``tokenizer(text)`` and truncated to the tokenizer's ``model_max_length``. They are turned into tokens once; the object can then
    be called with many models.
    """

    def __init__(self, tokenizer: Any, samples: Sequence[Sample], tokens_per_batch: int = 4096, *, name: str = "the data") -> None:
        """Turn the texts into batches of similar length.

        Args:
            tokenizer: Hugging Face tokenizer.
            samples: Texts with labels, at least one.
            tokens_per_batch: Largest number of tokens of a batch, padding included; a longer text is a batch of its own.
            name: Name of the samples in messages.

        Raises:
            LataError: There are no samples, one has no label, or some labels are words and others are numbers.
        """
        if not samples or tokens_per_batch < 1:
            raise LataError(f"accuracy needs at least one text and one token a batch, not {len(samples)} and {tokens_per_batch}")
        bare = [f"row {number}" for number, sample in enumerate(samples, start=1) if sample.label is None or sample.form != "text"]
        if bare:
            raise LataError(f"accuracy needs rows with 'text' and 'label'; in {name} it is missing in {first_three(bare)}")
        kinds = {type(sample.label) for sample in samples}
        if len(kinds) > 1:
            raise LataError(f"the labels of {name} must all be words or all be whole numbers; there are both")
        self.count, self._name = len(samples), name
        self._labels: list[Any] = [sample.label for sample in samples]
        self._rows = [tokenizer(sample.text, truncation=True)["input_ids"] for sample in samples]
        self._tokens_per_batch = tokens_per_batch

    def __call__(self, model: Any) -> float:
        """Return the accuracy of a transformers model for sequence classification, in [0, 1]; the model is not changed.

        Raises:
            LataError: The model does not have these labels.
        """
        return self.score(model).value

    def score(self, model: Any) -> Score:
        """Return the accuracy of a model with the number of texts and an interval; errors as for a call."""
        return share(self.matches(model))

    def matches(self, model: Any) -> list[bool]:
        """Return whether each text gets the right label, in the order of the samples; errors as for a call."""
        wanted = torch.tensor(label_numbers(self._labels, model.config, self._name))
        device = next(model.parameters()).device
        correct = [False] * self.count
        with evaluating(model):
            for members in self._batches(model):
                ids = [torch.tensor(self._rows[index]) for index in members]
                padding = 0 if model.config.pad_token_id is None else model.config.pad_token_id
                input_ids = torch.nn.utils.rnn.pad_sequence(ids, True, padding).to(device)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, 0).to(device)
                logits = model(input_ids=input_ids, attention_mask=mask).logits
                for index, right in zip(members, (logits.argmax(-1).cpu() == wanted[members]).tolist(), strict=True):
                    correct[index] = right
        return correct

    def _batches(self, model: Any) -> list[list[int]]:
        """Return the numbers of the texts of each batch; one text each for a model without a padding token."""
        if model.config.pad_token_id is None:
            return [[index] for index in range(self.count)]
        return groups_by_length([len(row) for row in self._rows], self._tokens_per_batch)


def label_numbers(labels: Sequence[int | str], config: Any, name: str) -> list[int]:
    """Return labels as the numbers of a model's classes.

    Args:
        labels: Whole numbers from 0, or class names of the model's config. If the config has no class names, and as many classes as there are different
            words, the words are numbered in alphabetical order, as ``lata fit`` does.
        config: Config of a transformers model, with ``num_labels`` and ``label2id``.
        name: Where the labels come from, for messages.

    Raises:
        LataError: A label is not among the classes.
    """
    classes = int(config.num_labels)
    if any(isinstance(label, str) for label in labels):
        known = {str(word): int(number) for word, number in (config.label2id or {}).items()}
        words = sorted({str(label) for label in labels})
        if not set(words) & set(known) and len(words) == classes and set(known) == {f"LABEL_{number}" for number in range(classes)}:
            known = {word: number for number, word in enumerate(words)}
        unknown = [word for word in words if word not in known]
        if unknown:
            raise LataError(
                f"the labels of {name} must be classes of the model, which are {first_three(known)}; others are {first_three(unknown)}. "
                "Write them into label2id and id2label of its config.json, or give their numbers."
            )
        return [known[str(label)] for label in labels]
    numbers = [int(label) for label in labels]
    odd = sorted({str(number) for number in numbers if not 0 <= number < classes})
    if odd:
        raise LataError(f"the labels of {name} must lie in 0 to {classes - 1}, the classes of the model; others are {first_three(odd)}")
    return numbers
