"""Choosing rule and scale on validation data: one load of the model, its weights set anew for every point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.curves import Point, Tuning, choose, height
from lata_lightning.evaluation.questions import MetricName
from lata_lightning.evaluation.scales import Reweighting
from lata_lightning.evaluation.search import MOST_POINTS, coarse_to_fine
from lata_lightning.layers import Level
from lata_lightning.merging.term import Term
from lata_lightning.merging.weigh import from_instruct, weigh
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting, check_weighting

FEW_ROWS = 200
"""With fewer distinct rows than this, scales chosen in experiments on small models cost points on the test data."""
DEFAULT_KEPT = 0.95
Scores = Callable[[Any], float]


def tune(
    model: Any,
    vectors: Mapping[str, Sequence[TaskVector]],
    data: Mapping[str, Scores],
    *,
    metric: MetricName = "exact_match",
    grid: Sequence[float] | None = None,
    control: Mapping[str, Scores] | None = None,
    kept: float = DEFAULT_KEPT,
    dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Score a model at every scale under every rule, and choose.

    For merging the best score wins. For forgetting, that is with control data, the vectors are taken off, and the point wins that leaves least of
    the validation score while the control score stays at or above its share of what the model had; for perplexity, where lower is better, the
    highest one wins while the control perplexity stays at or below the model's divided by that share. Of equal points the smallest scale wins, then
    the first rule.

    Args:
        model: Changed while this runs; afterwards it has its own weights again.
        vectors: By name of the rule, the same vectors with the coefficients it gives. Each is read again for every point.
        data: By name, a score of the model on validation data; for forgetting, of what is to be forgotten.
        metric: What the scores are.
        grid: Scales to score, every one of them; 0, the model itself, always is too. None searches from coarse to fine.
        control: By name, a score on data that must not suffer; with it, the vectors are taken off instead of added.
        kept: Share of the model's control performance to keep, in (0, 1].
        dtypes: Precision in which each tensor is stored, by its name in files, where the model holds it in a wider one.
        progress: Called after each point with the points done and the points in all, which are fewer where a search ends early.

    Returns:
        Every point and the choice.

    Raises:
        LayoutMismatchError: A vector does not hold the tensors of the model.
        LataError: No rule, vector or data is given, a scale is negative or not finite, ``kept`` is out of range, or the model itself has no finite score.

    Source: arXiv:2212.04089 and arXiv:2407.07089, scale of addition and negation on validation data, the latter under a control constraint of 0.95.
    """
    scales = None if grid is None else sorted({0.0, *grid})
    if not vectors or not all(vectors.values()) or not data:
        raise LataError("tuning needs at least one rule, one vector and one file of validation data")
    odd = [str(scale) for scale in scales or () if not (math.isfinite(scale) and scale >= 0)]
    if odd:
        raise LataError(
            f"scales must be finite and not negative; others are {first_three(odd)}. To take vectors off, give control data (--forget)."
        )
    if not 0 < kept <= 1:
        raise LataError(f"the share of control performance to keep must lie in (0, 1], got {kept}")
    scoring = _Scoring(model, metric, data, control or {}, kept if control else None, dtypes)
    most = 1 + MOST_POINTS if scales is None else len(scales)
    points: list[Point] = []
    try:
        start = scoring.score_start()
        for number, (rule, weighted) in enumerate(vectors.items()):
            later = most * (len(vectors) - number - 1)
            count = _counter(progress, len(points), most, later)
            points += scoring.curve(rule, weighted, scales, count)
            if progress is not None and len(points) + later < most * len(vectors):
                progress(len(points), len(points) + later)
    finally:
        scoring.restore()
    complete = [point for point in points if len(point.scores) == len(data) and len(point.control) == len(control or ())]
    best = choose(metric, complete, start, scoring.kept)
    return Tuning(metric, points, best, scoring.kept, "coarse-to-fine" if scales is None else "grid")


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
    found: dict[Weighting, list[TaskVector]] = {check_weighting(rule): [] for rule in rules}
    for vector in vectors:
        measured = None if instruction is None or set(found) <= {"none"} else align(vector, instruction, level, check_base=check_base)
        # One source for all rules, so that the vector is read once.
        plain = from_instruct(vector.unweighted(), instruction)
        for rule, weighted in found.items():
            alignment = None if rule == "none" else measured
            weighted.append(
                weigh(
                    plain, rule, instruction, alignment=alignment, level=level, threshold=threshold, outside=outside, check_base=check_base
                )
            )
    return {str(rule): weighted for rule, weighted in found.items()}


class _Scoring:
    """Scores of one model at many points.

    Args:
        model: Changed by ``curve``.
        metric, data, control, dtypes: As for ``tune``.
        kept: For forgetting, the share of the control performance to keep; None for merging.
    """

    def __init__(
        self,
        model: Any,
        metric: MetricName,
        data: Mapping[str, Scores],
        control: Mapping[str, Scores],
        kept: float | None,
        dtypes: Mapping[str, torch.dtype] | None,
    ) -> None:
        self.kept = kept
        self._model, self._metric, self._data, self._control = model, metric, data, control
        self._weights = Reweighting(model, dtypes)

    def score_start(self) -> Point:
        """The point of the model itself, which every curve begins with.

        Raises:
            LataError: It has no finite score.
        """
        self._start = self._point(0.0, "")
        missing = (set(self._data) | set(self._control)) - set(self._start.scores) - set(self._start.control)
        if missing:
            raise LataError(
                f"the model itself, at scale 0, has no finite {self._metric} on {first_three(missing)}: there is nothing to compare with"
            )
        return self._start

    def curve(self, rule: str, vectors: Sequence[TaskVector], scales: Sequence[float] | None, count: Callable[[int], None]) -> list[Point]:
        """Points of one rule by rising scale: those of some scales, or those of a search from coarse to fine; ``count`` is told how many there are."""
        points = {0.0: replace(self._start, weighting=rule)}
        count(1)

        def height_at(scale: float) -> float:
            self._weights.apply([Term(vector, scale if self.kept is None else -scale) for vector in vectors])
            points[scale] = self._point(scale, rule)
            count(len(points))
            return height(self._metric, points[scale], self._start, self.kept)

        if scales is None:
            coarse_to_fine(height_at, height(self._metric, self._start, self._start, self.kept))
        else:
            for scale in scales[1:]:
                height_at(scale)
        return [points[scale] for scale in sorted(points)]

    def restore(self) -> None:
        """Give the model its own weights back."""
        self._weights.restore()

    def _point(self, scale: float, rule: str) -> Point:
        scores, kept = (
            {name: value for name, score in side.items() if math.isfinite(value := score(self._model))}
            for side in (self._data, self._control)
        )
        return Point(scale, rule, scores, kept)


def _counter(progress: Callable[[int, int], None] | None, before: int, most: int, later: int) -> Callable[[int], None]:
    """What tells of the points of one rule after those before it, at most so many, and with so many at most to come later."""
    return lambda done: None if progress is None else progress(before + done, before + most + later)
