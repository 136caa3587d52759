"""Scores by rule and scale, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lata_lightning.display.charts import Lines, Series
from lata_lightning.errors import LataError
from lata_lightning.evaluation.questions import MetricName
from lata_lightning.evaluation.scales import best_scale

Search = Literal["grid", "coarse-to-fine"]


@dataclass(frozen=True)
class Point:
    """One scale under one rule.

    Attributes:
        scale: Multiplier of all vectors; for forgetting, how much is taken off.
        weighting: The rule for the coefficients.
        scores: By file, as the metric gives them; one that is no finite number is left out.
        control: For forgetting, the same of the files that must not suffer.
    """

    scale: float
    weighting: str
    scores: Mapping[str, float]
    control: Mapping[str, float] = field(default_factory=dict)


class Choice(NamedTuple):
    """The point that was chosen, and why.

    Attributes:
        scale, weighting: Of the point.
        score: What it was chosen by: the mean over the validation files (of perplexities the geometric mean).
        start_score: The same of the model itself, at scale 0.
        control, start_control: For forgetting, the same of the control files.
    """

    scale: float
    weighting: str
    score: float
    start_score: float
    control: float | None = None
    start_control: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The whole curve and the choice.

    Attributes:
        metric: ``exact_match``, ``perplexity`` or ``accuracy``.
        points: By rule, then by rising scale.
        best: The choice.
        kept: For forgetting, the share of the control performance that had to be kept; None for merging.
        search: ``grid``: every scale that was given; ``coarse-to-fine``: see ``coarse_to_fine``.
    """

    metric: MetricName
    points: Sequence[Point]
    best: Choice
    kept: float | None = None
    search: Search = "grid"

    @property
    def undecided(self) -> bool:
        """Whether exact match is 0 at every point, so that it cannot tell one from another."""
        return self.metric == "exact_match" and not any(score for point in self.points for score in point.scores.values())

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "task": "merge" if self.kept is None else "forget",
            "metric": self.metric,
            "kept": self.kept,
            "search": self.search,
            "points": [asdict(point) for point in self.points],
            "best": self.best._asdict(),
        }

    def chart(self) -> Lines:
        """The curves: for each rule the mean over the validation files and, for forgetting, over the control files, by scale."""
        rules = list(dict.fromkeys(point.weighting for point in self.points))
        series: list[Series] = []
        for rule in rules:
            points = [point for point in self.points if point.weighting == rule]
            curves = {rule: [point.scores for point in points]}
            if self.kept is not None:
                curves = {f"{rule}, to forget": curves[rule], f"{rule}, to keep": [point.control for point in points]}
            for name, scores in curves.items():
                means: dict[float | str, float | None] = {
                    point.scale: _height(self.metric, found) for point, found in zip(points, scores, strict=True)
                }
                series.append(Series(name, len(series), means))
        return Lines(
            key="tune",
            title="Scores by scale",
            summary=f"Chosen: {self.best.weighting} at scale {self.best.scale:g}.",
            x_title="scale",
            y_title=f"{'mean loss, nats' if self.metric == 'perplexity' else self.metric.replace('_', ' ')} (mean over files)",
            series=tuple(series),
        )


def mean_score(metric: MetricName, scores: Mapping[str, float]) -> float | None:
    """Mean of some scores: of perplexities the geometric one, which is the exponential of the mean loss; None without a score."""
    values = list(scores.values())
    if not values:
        return None
    if metric == "perplexity":
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def choose(metric: MetricName, points: Sequence[Point], start: Point, kept: float | None) -> Choice:
    """The best of some points.

    Args:
        metric: What the scores are.
        points: Those with all their scores.
        start: The model itself.
        kept: For forgetting, the share of the control performance to keep; None for merging.
    """
    return _highest(metric, points, start) if kept is None else _least_left(metric, points, start, kept)


def height(metric: MetricName, point: Point, start: Point, kept: float | None) -> float:
    """What a search wants to be high: the performance of a merge, or how little is left of what is to be forgotten.

    Args:
        metric: What the scores are.
        point: The point.
        start: The model itself, which has all its scores.
        kept: As for ``choose``.

    Returns:
        Minus infinity for a point that cannot be chosen, as a score is missing or the control is not kept.
    """
    if set(point.scores) != set(start.scores) or set(point.control) != set(start.control):
        return -math.inf
    performance = _performance(metric, point.scores)
    if kept is None:
        return performance
    return -performance if _performance(metric, point.control) >= kept * _performance(metric, start.control) else -math.inf


def _highest(metric: MetricName, points: Sequence[Point], start: Point) -> Choice:
    best: Point | None = None
    for rule in dict.fromkeys(point.weighting for point in points):
        curve = {point.scale: point for point in points if point.weighting == rule}
        found = curve[best_scale({scale: _performance(metric, point.scores) for scale, point in curve.items()})]
        if best is None or (_performance(metric, found.scores), -found.scale) > (_performance(metric, best.scores), -best.scale):
            best = found
    chosen = best or start
    return Choice(chosen.scale, chosen.weighting, _known(metric, chosen.scores), _known(metric, start.scores))


def _least_left(metric: MetricName, points: Sequence[Point], start: Point, kept: float) -> Choice:
    least = kept * _performance(metric, start.control)
    # Scale 0 always qualifies.
    allowed = [point for point in points if _performance(metric, point.control) >= least]
    best = min(allowed, key=lambda point: (_performance(metric, point.scores), point.scale))
    return Choice(
        best.scale,
        best.weighting,
        _known(metric, best.scores),
        _known(metric, start.scores),
        _known(metric, best.control),
        _known(metric, start.control),
    )


def _height(metric: MetricName, scores: Mapping[str, float]) -> float | None:
    """What a figure shows of a mean: of perplexities, which span orders of magnitude, the logarithm."""
    mean = mean_score(metric, scores)
    return math.log(mean) if mean is not None and metric == "perplexity" else mean


def _performance(metric: MetricName, scores: Mapping[str, float]) -> float:
    """The mean score, turned so that more is better and 0 is nothing: of a perplexity, its inverse."""
    value = _known(metric, scores)
    return 1 / value if metric == "perplexity" else value


def _known(metric: MetricName, scores: Mapping[str, float]) -> float:
    value = mean_score(metric, scores)
    if value is None:
        raise LataError("there is no score to choose by")
    return value
