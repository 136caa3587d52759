"""How sure a score is that was taken on a sample of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


class Score(NamedTuple):
    """A score, and how sure it is.

    Attributes:
        value: As the metric gives it.
        n: Rows it was taken on.
        interval: Ends of the 95 % confidence interval over the rows; None where there are too few rows for one.
    """

    value: float
    n: int
    interval: tuple[float, float] | None


class Measure(Protocol):
    """A metric on prepared rows, which can be called with many models."""

    def __call__(self, model: object) -> float:
        """Return the score of a model alone."""

    def score(self, model: object) -> Score:
        """Return the score of a model with the number of rows and an interval."""


def share(hits: Sequence[bool]) -> Score:
    """Return the share of rows that hit, with its Wilson interval.

    Args:
        hits: One for each row, at least one.

    Source: Wilson, JASA 22 (1927); unlike the normal approximation it stays in [0, 1] and is no point at 0 and 1.
    """
    count, rate = len(hits), sum(hits) / len(hits)
    middle = rate + _Z * _Z / (2 * count)
    half = _Z * math.sqrt(rate * (1 - rate) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    # Rounding must not put the ends on the wrong side of a share of 0 or 1.
    return Score(rate, count, (max(0.0, min(rate, (middle - half) / scale)), min(1.0, max(rate, (middle + half) / scale))))


def perplexity_score(losses: Sequence[float], tokens: Sequence[int]) -> Score:
    """Return the perplexity of texts, with an interval that treats the texts as drawn independently.

    Args:
        losses: Sum of the negative log-likelihoods of each text, in nats.
        tokens: Scored tokens of each text, at least one in all.

    Returns:
        The exponential of the mean loss of a token, infinite where it overflows. The interval is that of the logarithm, by the standard error of a
        ratio of two means; None for a single text.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.3.
    """
    count, total = len(losses), sum(tokens)
    mean = math.fsum(losses) / total
    if count < 2:
        return Score(_exponential(mean), count, None)
    residuals = math.fsum((loss - mean * size) ** 2 for loss, size in zip(losses, tokens, strict=True))
    error = math.sqrt(residuals * count / (count - 1)) / total
    return Score(_exponential(mean), count, (_exponential(mean - _Z * error), _exponential(mean + _Z * error)))


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
