"""Choosing weighting rule and scale on validation data, with one model in memory whose weights are set for every point."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.curves import Point, Tuning, choose, height
from lata_lightning.evaluation.metric_names import MetricName
from lata_lightning.evaluation.protocols import CONTROL_SHARE
from lata_lightning.evaluation.scales import Reweighting
from lata_lightning.evaluation.search import COARSE, MOST_POINTS, coarse_to_fine
from lata_lightning.layers import Level
from lata_lightning.merging.term import Term
from lata_lightning.merging.weigh import from_instruct, weigh
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting, check_weighting

FEW_ROWS = 200
"""With fewer distinct rows than this, scales chosen in experiments on small models cost points on the test data."""
Scores = Callable[[Any], float]


def tune(
    model: Any,
    vectors: Mapping[str, Sequence[TaskVector]],
    data: Mapping[str, Scores],
    *,
    metric: MetricName = "exact_match",
    grid: Sequence[float] | None = None,
    made_into_one: Collection[str] = (),
    control: Mapping[str, Scores] | None = None,
    control_share: float = CONTROL_SHARE,
    dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Score a model at many scales under every rule, and choose the best point.

    For merging, the best score wins. With control data, the vectors are subtracted to forget a skill. Then the point with the lowest validation score wins
    among those whose control score is at least ``control_share`` of the model's. For perplexity, where lower is better, the point with the highest one
    wins among those whose control perplexity is at most the model's divided by ``control_share``. Of equal points the smallest scale wins, then the first
    rule.

    Args:
        model: Changed while this runs; afterwards it has its own weights again.
        vectors: By name of the rule, the same vectors with the coefficients of that rule, or the one vector that a method of that name makes of them.
            Each is read again for every point.
        data: By name, functions that score the model on validation data; for forgetting, on the skill to forget.
        metric: Metric of the scores.
        grid: Scales to score; 0, the model itself, is always added. None searches from coarse to fine.
        made_into_one: Names under which ``vectors`` has the one vector that a method makes of several. Their search begins at scale 1.
        control: By name, functions that score the model on control data; with them, the vectors are subtracted instead of added.
        control_share: Share of the model's control performance that must remain, in (0, 1].
        dtypes: Precision of the stored tensors, by their names in files, where the model has them in a wider one.
        progress: Called after each point with the number of points done and of all points, which falls when a search ends early.

    Returns:
        Every point and the choice.

    Raises:
        LayoutMismatchError: The tensors of a vector are not those of the model.
        LataError: No rule, vector or data is given, a scale is negative or not finite, ``control_share`` is out of range, or a score of the model
            itself is not finite.

    Source: arXiv:2212.04089 and arXiv:2407.07089: scale of addition and negation on validation data, the latter under a control constraint of 0.95.
    """
    scales = None if grid is None else sorted({0.0, *grid})
    if not vectors or not all(vectors.values()) or not data:
        raise LataError("tuning needs at least one rule, one vector and one file of validation data")
    odd = [str(scale) for scale in scales or () if not (math.isfinite(scale) and scale >= 0)]
    if odd:
        raise LataError(
            f"scales must be finite and not negative; others are {first_three(odd)}. To take vectors off, give control data (--forget)."
        )
    if not 0 < control_share <= 1:
        raise LataError(f"the share of control performance to keep must lie in (0, 1], got {control_share}")
    scoring = _ScoredModel(model, metric, data, control or {}, control_share if control else None, dtypes)
    most = 1 + MOST_POINTS if scales is None else len(scales)
    points: list[Point] = []
    try:
        start = scoring.score_start()
        for number, (rule, weighted) in enumerate(vectors.items()):
            later = most * (len(vectors) - number - 1)
            count = _counter(progress, len(points), most, later)
            points += scoring.curve(rule, weighted, scales, count, first=1.0 if rule in made_into_one else COARSE[0])
            if progress is not None and len(points) + later < most * len(vectors):
                progress(len(points), len(points) + later)
    finally:
        scoring.restore()
    complete = [point for point in points if len(point.scores) == len(data) and len(point.control) == len(control or ())]
    best = choose(metric, complete, start, scoring.control_share)
    return Tuning(metric, points, best, scoring.control_share, "coarse-to-fine" if scales is None else "grid")


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
    """Weight vectors under each rule; all are relative to instruct, and those made from one vector share its tensors.

    Args:
        vectors: Task vectors.
        rules: ``linear``, ``log``, ``threshold`` or ``none``, which is plain task arithmetic.
        instruction: Instruction vector to measure the alignment with; by default the alignment that each vector stores is used.
        level: Unit of weighting.
        threshold: Used by the rule ``threshold``.
        outside: Coefficient of the tensors outside all layers.
        check_base: Refuse an instruction vector that is known to belong to other weights.

    Raises:
        WeightingError: A rule is unknown, or the layers cannot be ranked.
        BaseMismatchError, LayoutMismatchError: The instruction vector does not fit.
        LataError: A rule needs an alignment, and there is neither an instruction vector nor a stored alignment.
    """
    by_rule: dict[Weighting, list[TaskVector]] = {check_weighting(rule): [] for rule in rules}
    for vector in vectors:
        measured = None if instruction is None or set(by_rule) <= {"none"} else align(vector, instruction, level, check_base=check_base)
        # One source for all rules, so that the vector is read once.
        plain = from_instruct(vector.unweighted(), instruction)
        for rule, weighted in by_rule.items():
            alignment = None if rule == "none" else measured
            weighted.append(
                weigh(
                    plain, rule, instruction, alignment=alignment, level=level, threshold=threshold, outside=outside, check_base=check_base
                )
            )
    return {str(rule): weighted for rule, weighted in by_rule.items()}


class _ScoredModel:
    """Scoring one model at many points.

    Args:
        model: Changed by ``curve``.
        metric, data, control, dtypes: As for ``tune``.
        control_share: For forgetting, the share of the control performance that must remain; None for merging.
    """

    def __init__(
        self,
        model: Any,
        metric: MetricName,
        data: Mapping[str, Scores],
        control: Mapping[str, Scores],
        control_share: float | None,
        dtypes: Mapping[str, torch.dtype] | None,
    ) -> None:
        self.control_share = control_share
        self._model, self._metric, self._data, self._control = model, metric, data, control
        self._weights = Reweighting(model, dtypes)

    def score_start(self) -> Point:
        """Score the model itself, the first point of every curve.

        Raises:
            LataError: A score is not finite.
        """
        self._start = self._point(0.0, "")
        missing = (set(self._data) | set(self._control)) - set(self._start.scores) - set(self._start.control)
        if missing:
            raise LataError(
                f"the model itself, at scale 0, has no finite {self._metric} on {first_three(missing)}: there is nothing to compare with"
            )
        return self._start

    def curve(
        self, rule: str, vectors: Sequence[TaskVector], scales: Sequence[float] | None, count: Callable[[int], None], first: float
    ) -> list[Point]:
        """Return the points of one rule, by ascending scale.

        Args:
            rule: Name of the rule.
            vectors: The vectors, with the coefficients of the rule.
            scales: Scales to score; None searches from coarse to fine.
            count: Gets the number of points so far.
            first: The scale that a search begins with.
        """
        points = {0.0: replace(self._start, weighting=rule)}
        count(1)

        def height_at(scale: float) -> float:
            self._weights.apply([Term(vector, scale if self.control_share is None else -scale) for vector in vectors])
            points[scale] = self._point(scale, rule)
            count(len(points))
            return height(self._metric, points[scale], self._start, self.control_share)

        if scales is None:
            coarse_to_fine(height_at, height(self._metric, self._start, self._start, self.control_share), first)
        else:
            for scale in scales[1:]:
                height_at(scale)
        return [points[scale] for scale in sorted(points)]

    def restore(self) -> None:
        """Set the model's own weights again."""
        self._weights.restore()

    def _point(self, scale: float, rule: str) -> Point:
        scores, control = (
            {name: value for name, score in side.items() if math.isfinite(value := score(self._model))}
            for side in (self._data, self._control)
        )
        return Point(scale, rule, scores, control)


def _counter(progress: Callable[[int, int], None] | None, before: int, most: int, later: int) -> Callable[[int], None]:
    """Return a function that reports progress within one rule, after ``before`` points, with at most ``most`` in it and ``later`` after it."""
    return lambda done: None if progress is None else progress(before + done, before + most + later)
