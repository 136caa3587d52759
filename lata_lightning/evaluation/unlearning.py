"""Measuring how well a model has forgotten, by the measures of TOFU, MUSE and OpenUnlearning.

Names, definitions and the layout of the results are those of OpenUnlearning (arXiv:2506.12618), so that results can be compared with its tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lata_lightning.errors import CorruptFileError, LataError, first_three
from lata_lightning.evaluation.answers import Answers, AnswerScore, generated
from lata_lightning.evaluation.questions import Question, read_questions
from lata_lightning.evaluation.unlearning_measures import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    model_utility,
    need,
    rouge_l_recall,
    truth_ratio,
)

UTILITY_SETS = {"retain": "retain", "real_authors": "ra", "world_facts": "wf"}
"""The sets on which TOFU measures model utility, with their prefixes in the results."""
_TRUTH_RATIO = "forget_truth_ratio"


class Unlearning(NamedTuple):
    """Results of an unlearning evaluation.

    Attributes:
        evaluation: For each measure, ``agg_value``, and ``value_by_index`` with the figures of each row.
        summary: For each measure, ``agg_value`` alone; None where a measure has no value.
        notes: Reasons why measures have no value or not the usual meaning, one sentence each.
    """

    evaluation: dict[str, dict[str, Any]]
    summary: dict[str, float | None]
    notes: list[str]


def reference_ratios(path: str | Path) -> list[float]:
    """Read the truth ratios on the rows to be forgotten from the ``…_EVAL.json`` of a retrained model.

    Raises:
        CorruptFileError: The file holds no truth ratios.
    """
    try:
        rows = json.loads(Path(path).read_text("utf-8"))[_TRUTH_RATIO]["value_by_index"]
        ratios = [float(rows[index]["score"]) for index in sorted(rows, key=int)]
        if not ratios or not all(map(math.isfinite, ratios)):
            raise ValueError("no ratio, or one that is not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{path} holds no truth ratios ({error!r}): give the _EVAL.json of a retrained model, or its directory"
        ) from error
    return ratios


class UnlearningEvaluation:
    """All measures on one collection of questions, prepared once for many models.

    Args:
        tokenizer: Hugging Face tokenizer of the models, with a chat template and an end token.
        forget: JSONL file of the rows to be forgotten (see ``read_questions``).
        utility: Files by set of ``UTILITY_SETS``, with what the model should still know.
        max_new_tokens: Largest number of tokens of a generated answer.

    Raises:
        SourceError, CorruptFileError: A file cannot be read.
        LataError: A row has other fields, a set is unknown, or NLTK is not installed.
    """

    def __init__(self, tokenizer: Any, forget: str | Path, utility: Mapping[str, str | Path], max_new_tokens: int = 200) -> None:
        unknown = set(utility) - set(UTILITY_SETS)
        if unknown:
            raise LataError(f"utility is taken on the sets {', '.join(UTILITY_SETS)}, not on {', '.join(sorted(unknown))}")
        # Generation takes long, so a missing library is reported first.
        need("nltk")
        self._forget = _Set(tokenizer, read_questions(forget), max_new_tokens)
        self._utility = {name: _Set(tokenizer, read_questions(utility[name]), max_new_tokens) for name in UTILITY_SETS if name in utility}

    def truth_ratios(self, model: Any) -> list[float] | None:
        """Return the truth ratios of a model on the rows to be forgotten; None unless all of them have wrong answers."""
        return self._forget.scored(model).truth_ratios

    def __call__(self, model: Any, reference: Sequence[float] | None = None) -> Unlearning:
        """Compute every measure of a model, which is not changed.

        Args:
            model: Hugging Face causal language model.
            reference: Truth ratios of a model retrained without the rows to be forgotten; forget quality needs them.

        Raises:
            LataError: The likelihood of an answer is not finite.
        """
        forgetting, notes = self._measure_forgetting(model, reference)
        utility, more = self._measure_utility(model)
        evaluation = forgetting | utility
        return Unlearning(evaluation, {name: entry["agg_value"] for name, entry in evaluation.items()}, notes + more)

    def _measure_forgetting(self, model: Any, reference: Sequence[float] | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
        scored = self._forget.scored(model)
        ratios, quality, notes = scored.truth_ratios, None, []
        if ratios is None:
            notes.append("no truth ratio and no forget quality: not every row to be forgotten has a 'perturbed_answer'")
        elif reference is None:
            notes.append("no forget quality: it compares with a model retrained without these rows; give one as the reference")
        else:
            quality = forget_quality(ratios, reference)
        # The token that ends the turn is not part of the memorised answer.
        hits = [score.hits[:-1] for score in scored.answers]
        return {
            "forget_quality": _single(None if quality is None else quality.value),
            "forget_quality_log10": _single(None if quality is None else quality.log10),
            _TRUTH_RATIO: _entry(ratios, [min(ratio, 1 / ratio) if ratio else 0.0 for ratio in ratios or ()]),
            "forget_Q_A_Prob": scored.probabilities(),
            "forget_Q_A_ROUGE": self._forget.rouge(model),
            "exact_memorization": _entry([exact_memorization(row) for row in hits]),
            "extraction_strength": _entry([extraction_strength(row) for row in hits]),
        }, notes

    def _measure_utility(self, model: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
        evaluation: dict[str, dict[str, Any]] = {}
        incomplete = []
        for name, questions in self._utility.items():
            prefix, scored = UTILITY_SETS[name], questions.scored(model)
            ratios = scored.truth_ratios
            # TOFU normalises the probability of the answer by those of the wrong ones, except on the retain set.
            key, probability = ("Prob", scored.probabilities()) if name == "retain" else ("Prob_normalised", scored.shares())
            evaluation |= {
                f"{prefix}_Q_A_{key}": probability,
                f"{prefix}_Q_A_ROUGE": questions.rouge(model),
                f"{prefix}_Truth_Ratio": _entry(ratios, [max(0.0, 1 - ratio) for ratio in ratios or ()]),
            }
            incomplete += [name] if ratios is None else []
        values = [entry["agg_value"] for entry in evaluation.values()]
        notes = []
        if not self._utility:
            notes.append("no model utility: it needs questions that the model should still answer")
        elif incomplete:
            notes.append(f"no model utility: not every row of {', '.join(incomplete)} has a 'perturbed_answer'")
        elif len(self._utility) < len(UTILITY_SETS):
            notes.append(f"model utility is over {', '.join(self._utility)} only; TOFU's is over {', '.join(UTILITY_SETS)}")
        evaluation["model_utility"] = _single(model_utility(values) if values and not incomplete else None)
        return evaluation, notes


class _Scored(NamedTuple):
    """Scores of one set: of the answers, their paraphrases and the wrong answers; the last two are None where rows lack wrong answers."""

    answers: list[AnswerScore]
    right: list[AnswerScore] | None
    wrong: list[list[AnswerScore]] | None

    @property
    def truth_ratios(self) -> list[float] | None:
        if self.right is None or self.wrong is None:
            return None
        return [truth_ratio(right.loss, [one.loss for one in wrong]) for right, wrong in zip(self.right, self.wrong, strict=True)]

    def probabilities(self) -> dict[str, Any]:
        rows = [{"prob": score.probability, "avg_loss": score.loss} for score in self.answers]
        return {"agg_value": fmean(row["prob"] for row in rows), "value_by_index": _by_index(rows)}

    def shares(self) -> dict[str, Any]:
        """Return the probability of each answer divided by the sum of its own and those of the wrong answers."""
        if self.wrong is None:
            return _single(None)
        sums = [score.probability + sum(one.probability for one in wrong) for score, wrong in zip(self.answers, self.wrong, strict=True)]
        shares = [score.probability / total if total else 0.0 for score, total in zip(self.answers, sums, strict=True)]
        return {"agg_value": fmean(shares), "value_by_index": _by_index([{"prob": share} for share in shares])}


class _Set:
    """The questions of one file, and the tokens of every answer to score."""

    def __init__(self, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> None:
        self._tokenizer, self._questions, self._max_new_tokens = tokenizer, questions, max_new_tokens
        empty = [question.prompt for question in questions if not question.answer]
        if empty:
            raise LataError(f"what was memorised of an answer needs one that is not empty; empty are the answers to {first_three(empty)}")
        self._answers = Answers(tokenizer, [(question.prompt, question.answer) for question in questions])
        self._right = self._wrong = None
        if all(question.perturbed for question in questions):
            # TOFU's sets of real authors and world facts have no paraphrases; there the answer itself is used.
            self._right = Answers(tokenizer, [(question.prompt, question.paraphrased or question.answer) for question in questions])
            self._wrong = Answers(tokenizer, [(question.prompt, wrong) for question in questions for wrong in question.perturbed])

    def scored(self, model: Any) -> _Scored:
        answers = self._answers.scores(model)
        right = None if self._right is None else self._right.scores(model)
        wrong = [] if self._wrong is None else self._wrong.scores(model)
        strange = sum(not math.isfinite(score.loss) for score in (*answers, *(right or ()), *wrong))
        if strange:
            raise LataError(
                f"the model gives {strange} answers a likelihood that is no number: are its weights whole, and its precision wide enough?"
            )
        rest = iter(wrong)
        return _Scored(
            answers, right, None if right is None else [[next(rest) for _ in question.perturbed] for question in self._questions]
        )

    def rouge(self, model: Any) -> dict[str, Any]:
        answers = generated(model, self._tokenizer, [question.prompt for question in self._questions], self._max_new_tokens)
        recalls = rouge_l_recall(answers, [question.answer for question in self._questions])
        rows = [
            {"rougeL_recall": recall, "input": question.prompt, "ground_truth": question.answer, "generation": answer}
            for recall, question, answer in zip(recalls, self._questions, answers, strict=True)
        ]
        return {"agg_value": fmean(recalls), "value_by_index": _by_index(rows)}


def _single(value: float | None) -> dict[str, Any]:
    return {"agg_value": value}


def _entry(values: Sequence[float] | None, judged: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the value of each row, and the mean of the values or, if given, of the ``judged`` numbers."""
    if values is None:
        return _single(None)
    rows = [{"score": value if math.isfinite(value) else None} for value in values]
    return {"agg_value": fmean(values if judged is None else judged), "value_by_index": _by_index(rows)}


def _by_index(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(index): row for index, row in enumerate(rows)}
