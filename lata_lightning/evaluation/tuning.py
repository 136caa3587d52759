"""Choosing rule and scale on validation data: one load of the model, its weights set anew for every point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from lata_lightning.display.charts import Lines, Series
from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.questions import MetricName
from lata_lightning.evaluation.scales import Reweighting, best_scale
from lata_lightning.layers import Level
from lata_lightning.merging.merge import Term
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting, check_weighting

DEFAULT_GRID = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
"""Fine where a little of a vector already helps, and up to where the merge has usually broken down."""
FEW_ROWS = 200
"""With fewer distinct rows than this, scales chosen in experiments on small models cost points on the test data."""
DEFAULT_KEPT = 0.95
Scores = Callable[[Any], float]


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
        metric: ``exact_match`` or ``perplexity``.
        points: By rule, then by rising scale.
        best: The choice.
        kept: For forgetting, the share of the control performance that had to be kept; None for merging.
    """

    metric: MetricName
    points: Sequence[Point]
    best: Choice
    kept: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "task": "merge" if self.kept is None else "forget",
            "metric": self.metric,
            "kept": self.kept,
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
            y_title=f"{'mean loss, nats' if self.metric == 'perplexity' else 'exact match'} (mean over files)",
            series=tuple(series),
        )


def tune(
    model: Any,
    vectors: Mapping[str, Sequence[TaskVector]],
    data: Mapping[str, Scores],
    *,
    metric: MetricName = "exact_match",
    grid: Sequence[float] = DEFAULT_GRID,
    control: Mapping[str, Scores] | None = None,
    kept: float = DEFAULT_KEPT,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Score a model at every scale under every rule, and choose.

    For merging the best score wins. For forgetting, that is with control data, the vectors are taken off, and the point wins that leaves least of
    the validation score while the control score stays at or above its share of what the model had; for perplexity, where lower is better, the
    highest one wins while the control perplexity stays at or below the model's divided by that share. Of equal points the smallest scale wins, then
    the first rule.

    Args:
        model: Changed while this runs; afterwards it has its own weights again.
        vectors: By name of the rule, the same vectors with the coefficients it gives. Each is read once.
        data: By name, a score of the model on validation data; for forgetting, of what is to be forgotten.
        metric: What the scores are.
        grid: Scales; 0, the model itself, is always scored too.
        control: By name, a score on data that must not suffer; with it, the vectors are taken off instead of added.
        kept: Share of the model's control performance to keep, in (0, 1].
        progress: Called after each point with the points done and the points in all.

    Returns:
        Every point and the choice.

    Raises:
        LayoutMismatchError: A vector does not hold the parameters of the model.
        LataError: No rule, vector or data is given, a scale is negative or not finite, ``kept`` is out of range, or the model itself has no finite score.

    Source: arXiv:2212.04089 and arXiv:2407.07089, scale of addition and negation on validation data, the latter under a control constraint of 0.95.
    """
    scales = sorted({0.0, *grid})
    if not vectors or not all(vectors.values()) or not data:
        raise LataError("tuning needs at least one rule, one vector and one file of validation data")
    odd = [str(scale) for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if odd:
        raise LataError(
            f"scales must be finite and not negative; others are {first_three(odd)}. To take vectors off, give control data (--forget)."
        )
    if not 0 < kept <= 1:
        raise LataError(f"the share of control performance to keep must lie in (0, 1], got {kept}")
    weights = Reweighting(model)
    points: list[Point] = []
    try:
        start = _point(model, 0.0, "", data, control)
        missing = (set(data) | set(control or ())) - set(start.scores) - set(start.control)
        if missing:
            raise LataError(
                f"the model itself, at scale 0, has no finite {metric} on {first_three(missing)}: there is nothing to compare with"
            )
        for rule, weighted in vectors.items():
            for scale in scales:
                if scale == 0:
                    points.append(replace(start, weighting=rule))
                else:
                    weights.apply([Term(vector, -scale if control else scale) for vector in weighted])
                    points.append(_point(model, scale, rule, data, control))
                if progress is not None:
                    progress(len(points), len(vectors) * len(scales))
    finally:
        weights.restore()
    complete = [point for point in points if len(point.scores) == len(data) and len(point.control) == len(control or ())]
    choose = _least_left if control else _highest
    return Tuning(metric, points, choose(metric, complete, start, kept), kept if control else None)


def under_rules(
    vectors: Sequence[TaskVector],
    rules: Sequence[Weighting],
    instruction: TaskVector | None = None,
    *,
    level: Level = "block",
    threshold: float = DEFAULT_THRESHOLD,
    outside: float = 0.0,
    check_base: bool = True,
) -> dict[str, list[TaskVector]]:
    """The same vectors with the coefficients of each rule, all of them counted from instruct; those of one vector share its tensors.

    Args:
        vectors: Task vectors.
        rules: ``linear``, ``log``, ``threshold`` or ``none``, which is plain task arithmetic.
        instruction: Instruction vector to measure the alignment with; by default the alignment that each vector stores is used.
        level: Unit of the coefficients.
        threshold: For ``threshold``.
        outside: Coefficient of the tensors in no layer.
        check_base: Refuse an instruction vector that is known to belong to other weights.

    Raises:
        WeightingError: A rule is unknown, or the layers cannot be ranked.
        BaseMismatchError, LayoutMismatchError: The instruction vector does not fit.
        LataError: A rule needs an alignment and there is neither an instruction vector nor one stored.
    """
    found: dict[str, list[TaskVector]] = {check_weighting(rule): [] for rule in rules}
    for vector in vectors:
        alignment = vector.manifest.alignment
        if instruction is not None:
            alignment = align(vector, instruction, level, check_base=check_base)
        plain = vector.unweighted()
        if vector.start == "base" and instruction is not None:
            plain = plain.without(instruction)
        for rule, weighted in found.items():
            if rule == "none":
                weighted.append(plain)
                continue
            if alignment is None or alignment.level != level:
                raise LataError(
                    f"{vector.label} stores no alignment by {level}, so the rule {rule!r} needs an instruction vector to measure it (--instruction VECTOR)"
                )
            ranked = plain.weighted(alignment, check_weighting(rule), threshold=threshold, outside=outside, instruction_vector=instruction)
            weighted.append(TaskVector(ranked.tensors, replace(ranked.manifest, start=plain.start)))
    return found


def mean_score(metric: MetricName, scores: Mapping[str, float]) -> float | None:
    """Mean of some scores: of perplexities the geometric one, which is the exponential of the mean loss; None without a score."""
    values = list(scores.values())
    if not values:
        return None
    if metric == "perplexity":
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def _point(model: Any, scale: float, rule: str, data: Mapping[str, Scores], control: Mapping[str, Scores] | None) -> Point:
    scores, kept = ({name: value for name, score in side.items() if math.isfinite(value := score(model))} for side in (data, control or {}))
    return Point(scale, rule, scores, kept)


def _highest(metric: MetricName, points: Sequence[Point], start: Point, kept: float) -> Choice:
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
