"""Continual-learning metrics from the accuracy matrix: how well a model keeps earlier tasks while it learns later ones.

The matrix has one column for each task, in the order of learning, and one row for each stage: row i holds the scores after the first i + 1 tasks have been
learned. It has fewer rows than columns until the sequence is finished. An entry that was not measured is NaN, and a metric that needs it is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lata_lightning.errors import LataError

Matrix = Tensor | Sequence[Sequence[float]]


def average_accuracy(accuracies: Matrix) -> float | None:
    """Return the mean score, after the last stage, on the tasks learned so far.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured.

    Returns:
        In the unit of the scores; None before the first stage, or where a score it needs was not measured.

    Raises:
        LataError: The matrix has no columns, more rows than columns, or another shape.

    Source: Lopez-Paz and Ranzato, arXiv:1706.08840, ACC; Chaudhry et al., arXiv:1801.10112, A_k.
    """
    matrix = _checked(accuracies)
    stages = len(matrix)
    return _mean(matrix[-1, :stages]) if stages else None


def backward_transfer(accuracies: Matrix) -> float | None:
    """Return the mean change of the score on each earlier task, from just after it was learned to the last stage.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured.

    Returns:
        Negative where later tasks made earlier ones worse; None with fewer than two stages, or where a needed score was not measured.

    Raises:
        LataError: As for ``average_accuracy``.

    Source: Lopez-Paz and Ranzato, arXiv:1706.08840, BWT.
    """
    matrix = _checked(accuracies)
    earlier = len(matrix) - 1
    return _mean(matrix[-1, :earlier] - matrix.diagonal()[:earlier]) if earlier > 0 else None


def forward_transfer(accuracies: Matrix, reference: Tensor | Sequence[float] | None) -> float | None:
    """Return the mean score on each later task just before it is learned, minus the score of a model that has learned no task.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured.
        reference: Score on each task of a model that has learned none: the start of a fine-tune; in the source, a model with random weights.

    Returns:
        Positive where earlier tasks helped later ones; None with fewer than two stages, without a reference, or where a needed score was not measured.

    Raises:
        LataError: As for ``average_accuracy``, or the reference does not have one score per task.

    Source: Lopez-Paz and Ranzato, arXiv:1706.08840, FWT.
    """
    matrix = _checked(accuracies)
    if reference is None:
        return None
    untrained = torch.as_tensor(reference, dtype=torch.float64)
    if untrained.shape != matrix.shape[1:]:
        raise LataError(f"the reference must hold one score for each of {matrix.shape[1]} tasks, its shape is {tuple(untrained.shape)}")
    later = range(1, len(matrix))
    return _mean(torch.stack([matrix[task - 1, task] - untrained[task] for task in later])) if later else None


def forgetting(accuracies: Matrix) -> float | None:
    """Return the mean loss on the earlier tasks: the best score of each at any earlier stage minus its score after the last stage.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured. Stages before a task was learned count too, if they were measured.

    Returns:
        In [-1, 1] for accuracies, negative where the last stage is the best; None with fewer than two stages, or where an earlier task was not measured
        at every stage since it was learned.

    Raises:
        LataError: As for ``average_accuracy``.

    Source: Chaudhry et al., arXiv:1801.10112, F_k.
    """
    matrix = _checked(accuracies)
    earlier = len(matrix) - 1
    if earlier < 1:
        return None
    losses = []
    for task in range(earlier):
        if matrix[task:, task].isnan().any():
            return None
        before = matrix[:earlier, task]
        losses.append(before[~before.isnan()].max() - matrix[-1, task])
    return _mean(torch.stack(losses))


def summary(accuracies: Matrix, reference: Tensor | Sequence[float] | None = None) -> dict[str, float | None]:
    """Return all four metrics after the last stage, by name; None where one has no value."""
    return {
        "average_accuracy": average_accuracy(accuracies),
        "backward_transfer": backward_transfer(accuracies),
        "forward_transfer": forward_transfer(accuracies, reference),
        "forgetting": forgetting(accuracies),
    }


class ContinualLearning(Metric):
    """The accuracy matrix of a sequence of tasks as a torchmetrics metric.

    Its state is the matrix as sums and counts of scores, so it adds up over batches and processes. One more row holds the scores of the model that has
    learned no task.

    Args:
        tasks: Number of tasks.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        LataError: There is no task.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    sums: Tensor
    counts: Tensor

    def __init__(self, tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if tasks < 1:
            raise LataError(f"a sequence needs at least one task, not {tasks}")
        self.tasks = tasks
        for state in ("sums", "counts"):
            self.add_state(state, default=torch.zeros(tasks + 1, tasks, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, task: int, stage: int | None) -> None:
        """Add scores of one task at one stage.

        Args:
            scores: One for each example, such as whether it was answered exactly; any shape and dtype, at least one.
            task: Number of the task, from 0.
            stage: Number of the last task learned, from 0; None for the model that has learned no task.

        Raises:
            LataError: There is no such task or stage, or no score.
        """
        if not 0 <= task < self.tasks or not (stage is None or 0 <= stage < self.tasks):
            raise LataError(f"tasks and stages count from 0 to {self.tasks - 1}, got task {task} and stage {stage}")
        if scores.numel() == 0:
            raise LataError(f"no scores were given for task {task} at stage {stage}")
        row = 0 if stage is None else stage + 1
        self.sums[row, task] += scores.to(self.sums.device, torch.float64).sum()
        self.counts[row, task] += scores.numel()

    @property
    def accuracies(self) -> Tensor:
        """The matrix so far: float64 of shape (stages, tasks), up to the last stage measured; NaN where nothing was measured."""
        measured = self.counts[1:].sum(1).nonzero()
        return self._means[1 : 1 + (int(measured.max()) + 1 if len(measured) else 0)]

    @property
    def reference(self) -> Tensor:
        """Scores of the model that has learned no task: float64 of shape (tasks,), NaN where nothing was measured."""
        return self._means[0]

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of ``summary`` as float64 scalars; metrics without a value are absent."""
        values = summary(self.accuracies, self.reference)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if value is not None}

    @property
    def _means(self) -> Tensor:
        # 0 / 0 is NaN, which marks entries without a measurement.
        return self.sums / self.counts


def _checked(accuracies: Matrix) -> Tensor:
    matrix = torch.as_tensor(accuracies, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.shape[0] > matrix.shape[1]:
        raise LataError(
            f"the accuracy matrix must have a row per stage and a column per task, no more rows than columns; it has {tuple(matrix.shape)}"
        )
    return matrix


def _mean(scores: Tensor) -> float | None:
    mean = float(scores.mean())
    return None if mean != mean else mean
