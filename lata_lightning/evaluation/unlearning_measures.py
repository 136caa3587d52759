"""The formulas by which unlearning is judged: forget quality, truth ratio, memorisation, ROUGE-L recall and model utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean, harmonic_mean
from typing import NamedTuple

from lata_lightning.errors import LataError


class ForgetQuality(NamedTuple):
    """Outcome of a Kolmogorov-Smirnov test; ``log10`` is None where the value is too small for a float."""

    value: float
    log10: float | None


def truth_ratio(correct_loss: float, perturbed_losses: Sequence[float]) -> float:
    """How likely wrong answers are, compared with the right one in other words.

    Args:
        correct_loss: Mean negative log-likelihood of the paraphrased right answer's tokens, in nats.
        perturbed_losses: The same of the wrong answers, at least one.

    Returns:
        Geometric mean of the wrong answers' probabilities over the probability of the right one, each normalised by its length; not negative, below 1
        where the model prefers the right answer, infinite where it overflows. The text of the source writes an arithmetic mean; the geometric one
        is what its code, and so its tables, have.

    Raises:
        LataError: There is no wrong answer.

    Source: TOFU, arXiv:2401.06121, equation 1 and ``aggregate_eval_stat.py``.
    """
    if not perturbed_losses:
        raise LataError("a truth ratio needs at least one wrong answer")
    try:
        return math.exp(correct_loss - fmean(perturbed_losses))
    except OverflowError:
        return math.inf


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> ForgetQuality:
    """How likely it is that two models' truth ratios come from one distribution.

    Args:
        ratios: Truth ratios on the rows to be forgotten, of the model that was made to forget them.
        reference: Those of a model trained without these rows.

    Returns:
        The p-value of the two-sided Kolmogorov-Smirnov test, in [0, 1], and its decimal logarithm. High: the models cannot be told apart.

    Raises:
        LataError: One side is empty, or SciPy is not installed.

    Source: TOFU, arXiv:2401.06121, section 3.3.
    """
    if not ratios or not reference:
        raise LataError(f"forget quality compares the truth ratios of two models, got {len(ratios)} and {len(reference)} of them")
    need("scipy")
    from scipy.stats import ks_2samp

    value = float(ks_2samp(ratios, reference).pvalue)
    return ForgetQuality(value, math.log10(value) if value > 0 else None)


def exact_memorization(hits: Sequence[bool]) -> float:
    """Share of an answer's tokens that are the most likely ones when the tokens before them are fed in.

    Args:
        hits: For each token of the answer, without the one that ends the turn, whether it is; at least one.

    Returns:
        In [0, 1].

    Source: Tirumala et al., arXiv:2205.10770; OpenUnlearning, arXiv:2506.12618.
    """
    _check_hits(hits)
    return sum(hits) / len(hits)


def extraction_strength(hits: Sequence[bool]) -> float:
    """Share of an answer that the model completes by itself from the shortest beginning after which it makes no mistake.

    Args:
        hits: For each token of the answer, without the one that ends the turn, whether it is the most likely one when the tokens before it are fed in;
            at least one.

    Returns:
        1 − k/n for the smallest k of n tokens after which all are hits: 1 where all are, 0 where the last one is none. (OpenUnlearning's code gives
        1/n in that last case, as it never tries the empty rest.)

    Source: Carlini et al., arXiv:2012.07805; OpenUnlearning, arXiv:2506.12618, definition for tokens fed in.
    """
    _check_hits(hits)
    completed = 0
    while completed < len(hits) and hits[-1 - completed]:
        completed += 1
    return completed / len(hits)


def rouge_l_recall(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each answer: the longest common subsequence of words, as a share of the reference's words.

    Args:
        answers: What a model answered.
        references: What is right, one for each.

    Returns:
        In [0, 1], in their order; words are stemmed by Porter's rules, as in TOFU; 0 where either side has no words.

    Raises:
        LataError: The numbers differ, or NLTK, which stems, is not installed.

    Source: TOFU, arXiv:2401.06121; MUSE, arXiv:2407.06460, knowledge memorisation.
    """
    if len(answers) != len(references):
        raise LataError(f"ROUGE-L compares each answer with one reference, got {len(answers)} and {len(references)}")
    need("nltk")
    from torchmetrics.functional.text.rouge import rouge_score

    return [
        float(rouge_score(answer, reference, use_stemmer=True, rouge_keys="rougeL")["rougeL_recall"])
        for answer, reference in zip(answers, references, strict=True)
    ]


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of what a model can still do: low as soon as one value is, 0 where one is 0.

    Args:
        values: In [0, 1], at least one. TOFU takes nine: probability, ROUGE-L recall and truth ratio on the sets retain, real authors, world facts.

    Raises:
        LataError: There is no value, or one is negative.

    Source: TOFU, arXiv:2401.06121, section 3.3.
    """
    if not values or min(values) < 0:
        raise LataError(f"model utility needs at least one value and none below 0, got {list(values)}")
    return float(harmonic_mean(values))


def _check_hits(hits: Sequence[bool]) -> None:
    if not hits:
        raise LataError("an answer without tokens was not memorised or forgotten: give at least one")


def need(module: str) -> None:
    """Refuse to go on without a library of the extra ``eval``."""
    if find_spec(module) is None:
        raise LataError(f"this measure needs {module}, which is not installed: pip install 'lata_lightning[eval]'")
