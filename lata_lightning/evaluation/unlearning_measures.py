"""The formulas of the unlearning measures: forget quality, truth ratio, memorisation, ROUGE-L recall and model utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean, harmonic_mean
from typing import NamedTuple

from lata_lightning.errors import LataError


class ForgetQuality(NamedTuple):
    """P-value of a Kolmogorov-Smirnov test and its decimal logarithm, which is None where the value underflows to 0."""

    value: float
    log10: float | None


def truth_ratio(correct_loss: float, perturbed_losses: Sequence[float]) -> float:
    """Return the probability of the wrong answers relative to that of the paraphrased right answer.

    Args:
        correct_loss: Mean negative log-likelihood of the paraphrased right answer's tokens, in nats.
        perturbed_losses: The same for each wrong answer, at least one.

    Returns:
        Geometric mean of the wrong answers' probabilities divided by the probability of the right one, each normalised by its length. At least 0, below 1
        where the model prefers the right answer, infinite where it overflows. The text of the source has an arithmetic mean; its code, and so its
        tables, use the geometric mean.

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
    """Test whether two models' truth ratios come from one distribution.

    Args:
        ratios: Truth ratios, on the rows to be forgotten, of the model that should have forgotten them.
        reference: Truth ratios of a model trained without these rows.

    Returns:
        The p-value of the two-sided Kolmogorov-Smirnov test, in [0, 1], and its decimal logarithm. With a high value the models cannot be told apart.

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
    """Return the share of an answer's tokens that are the most likely ones given the right tokens before them.

    Args:
        hits: For each token of the answer, without the one that ends the turn, whether it is the most likely one; at least one.

    Returns:
        In [0, 1].

    Source: Tirumala et al., arXiv:2205.10770; OpenUnlearning, arXiv:2506.12618.
    """
    _check_hits(hits)
    return sum(hits) / len(hits)


def extraction_strength(hits: Sequence[bool]) -> float:
    """Return the share of an answer that the model completes by itself after the shortest prefix from which it makes no mistake.

    Args:
        hits: As for ``exact_memorization``.

    Returns:
        1 − k/n for the smallest k of n tokens after which all are hits: 1 where all are hits, 0 where the last one is not. (OpenUnlearning's code
        returns 1/n in that last case, as it never tries the empty suffix.)

    Source: Carlini et al., arXiv:2012.07805; OpenUnlearning, arXiv:2506.12618, the definition with teacher forcing.
    """
    _check_hits(hits)
    completed = 0
    while completed < len(hits) and hits[-1 - completed]:
        completed += 1
    return completed / len(hits)


def rouge_l_recall(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the ROUGE-L recall of each answer: the longest common subsequence of words, as a share of the reference's words.

    Args:
        answers: Answers of a model.
        references: The right answers, one for each.

    Returns:
        In [0, 1], in the given order; 0 where either side has no words. Words are stemmed by Porter's rules, as in TOFU.

    Raises:
        LataError: The numbers of answers and references differ, or NLTK, which stems words, is not installed.

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
    """Return the harmonic mean of the utility scores: low if any score is low, 0 if one is 0.

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
    """Raise a LataError if a library of the extra ``eval`` is not installed."""
    if find_spec(module) is None:
        raise LataError(f"this measure needs {module}, which is not installed: pip install 'lata_lightning[eval]'")
