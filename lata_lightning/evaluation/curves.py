"""Scores of a model by weighting rule and scale, and choosing the best point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lata_lightning.display.charts import Lines, Series
from lata_lightning.errors import LataError
from lata_lightning.evaluation.metric_names import MetricName
from lata_lightning.evaluation.scales import best_scale

Search = Literal["grid", "coarse-to-fine"]


@dataclass(frozen=True)
class Point:
    """Scores at one scale under one rule.

    Attributes:
        scale: Multiplier of all vectors; for forgetting, of what is subtracted.
        weighting: The weighting rule, or the method that made one vector of several.
        scores: Score on each file; scores that are not finite are left out.
        control: For forgetting, the score on each control file.
    """

    scale: float
    weighting: str
    scores: Mapping[str, float]
    control: Mapping[str, float] = field(default_factory=dict)


class Choice(NamedTuple):
    """The chosen point and its scores.

    Attributes:
        scale, weighting: Scale and rule of the point.
        score: Mean score on the validation files; the geometric mean for perplexities.
        start_score: The same for the model itself, at scale 0.
        control, start_control: For forgetting, the same on the control files.
    """

    scale: float
    weighting: str
    score: float
    start_score: float
    control: float | None = None
    start_control: float | None = None


@dataclass(frozen=True)
class Tuning:
    """All points that were scored, and the chosen one.

    Attributes:
        metric: ``exact_match``, ``perplexity`` or ``accuracy``.
        points: Sorted by rule, then by scale.
        best: The chosen point.
        control_share: For forgetting, the share of the control performance that had to remain; None for merging.
        search: ``grid``: every given scale; ``coarse-to-fine``: see ``coarse_to_fine``.
    """

    metric: MetricName
    points: Sequence[Point]
    best: Choice
    control_share: float | None = None
    search: Search = "grid"

    @property
    def undecided(self) -> bool:
        """Whether exact match is 0 at every point, so that it cannot tell points apart."""
        return self.metric == "exact_match" and not any(score for point in self.points for score in point.scores.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "task": "merge" if self.control_share is None else "forget",
            "metric": self.metric,
            "kept": self.control_share,
            "search": self.search,
            "points": [asdict(point) for point in self.points],
            "best": self.best._asdict(),
        }

    def chart(self) -> Lines:
        """Return the mean score by scale as a chart, one line for each rule and, for forgetting, one more for the control files."""
        rules = list(dict.fromkeys(point.weighting for point in self.points))
        series: list[Series] = []
        for rule in rules:
            points = [point for point in self.points if point.weighting == rule]
            curves = {rule: [point.scores for point in points]}
            if self.control_share is not None:
                curves = {f"{rule}, to forget": curves[rule], f"{rule}, to keep": [point.control for point in points]}
            for name, scores in curves.items():
                means: dict[float | str, float | None] = {
                    point.scale: _height(self.metric, values) for point, values in zip(points, scores, strict=True)
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
    """Return the mean of some scores, None without a score; for perplexities the geometric mean, the exponential of the mean loss."""
    values = list(scores.values())
    if not values:
        return None
    if metric == "perplexity":
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def choose(metric: MetricName, points: Sequence[Point], start: Point, control_share: float | None) -> Choice:
    """Choose the best point.

    Args:
        metric: Metric of the scores.
        points: The points that have all their scores.
        start: The point of the model itself.
        control_share: For forgetting, the share of the control performance that must remain; None for merging.
    """
    return _highest(metric, points, start) if control_share is None else _least_left(metric, points, start, control_share)


def height(metric: MetricName, point: Point, start: Point, control_share: float | None) -> float:
    """Return the objective of a search, higher is better: the performance of a merge, or minus the performance on what is to be forgotten.

    Args:
        metric: Metric of the scores.
        point: The point.
        start: The point of the model itself, which has all its scores.
        control_share: As for ``choose``.

    Returns:
        Minus infinity for a point that cannot be chosen, because a score is missing or the control performance is too low.
    """
    if set(point.scores) != set(start.scores) or set(point.control) != set(start.control):
        return -math.inf
    performance = _performance(metric, point.scores)
    if control_share is None:
        return performance
    return -performance if _performance(metric, point.control) >= control_share * _performance(metric, start.control) else -math.inf


def _highest(metric: MetricName, points: Sequence[Point], start: Point) -> Choice:
    best: Point | None = None
    for rule in dict.fromkeys(point.weighting for point in points):
        curve = {point.scale: point for point in points if point.weighting == rule}
        candidate = curve[best_scale({scale: _performance(metric, point.scores) for scale, point in curve.items()})]
        if best is None or (_performance(metric, candidate.scores), -candidate.scale) > (_performance(metric, best.scores), -best.scale):
            best = candidate
    chosen = best or start
    return Choice(chosen.scale, chosen.weighting, _known(metric, chosen.scores), _known(metric, start.scores))


def _least_left(metric: MetricName, points: Sequence[Point], start: Point, control_share: float) -> Choice:
    least = control_share * _performance(metric, start.control)
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
    """Return the mean score for a figure; for perplexities, which span orders of magnitude, its logarithm."""
    mean = mean_score(metric, scores)
    return math.log(mean) if mean is not None and metric == "perplexity" else mean


def _performance(metric: MetricName, scores: Mapping[str, float]) -> float:
    """Return the mean score such that more is better and 0 is the worst; for perplexities its inverse."""
    value = _known(metric, scores)
    return 1 / value if metric == "perplexity" else value


def _known(metric: MetricName, scores: Mapping[str, float]) -> float:
    value = mean_score(metric, scores)
    if value is None:
        raise LataError("there is no score to choose by")
    return value
