"""How well a model that learns one task after the other keeps the earlier ones, from its accuracy matrix.

The matrix has a row for each stage, that is after each task, and a column for each task: row i holds the scores after the first i + 1 tasks were
learned, in the order of the columns. It may have fewer rows than columns while the sequence is under way. An entry that was not measured is NaN, and
a figure that would need it is None: nothing is filled in.
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
    """Mean score, after the last stage, of the tasks learned so far.

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
    """Mean change, up to the last stage, of the score that each earlier task had just after it was learned.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured.

    Returns:
        Negative where learning the later tasks cost the earlier ones; None with fewer than two stages, as there is no earlier task yet, or where a
        score it needs was not measured.

    Raises:
        LataError: As for ``average_accuracy``.

    Source: Lopez-Paz and Ranzato, arXiv:1706.08840, BWT.
    """
    matrix = _checked(accuracies)
    earlier = len(matrix) - 1
    return _mean(matrix[-1, :earlier] - matrix.diagonal()[:earlier]) if earlier > 0 else None


def forward_transfer(accuracies: Matrix, reference: Tensor | Sequence[float] | None) -> float | None:
    """Mean head start of the tasks just before they were learned, over a model that learned none.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured.
        reference: Score of each task under the model that learned nothing: in the source one at random weights; for fine-tunes, the start.

    Returns:
        Positive where the earlier tasks helped the later ones; None with fewer than two stages, without a reference, or where a score it needs was
        not measured.

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
    """Mean loss of the earlier tasks: from the best score each ever had at an earlier stage to the one after the last.

    Args:
        accuracies: Shape (stages, tasks); NaN where nothing was measured. Stages before a task was learned take part where they were measured.

    Returns:
        In [-1, 1] for accuracies, negative where the last stage is the best; None with fewer than two stages, or where a score from its own stage on
        was not measured for an earlier task.

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
    """All four figures after the last stage, by name; None where one has no value."""
    return {
        "average_accuracy": average_accuracy(accuracies),
        "backward_transfer": backward_transfer(accuracies),
        "forward_transfer": forward_transfer(accuracies, reference),
        "forgetting": forgetting(accuracies),
    }


class ContinualLearning(Metric):
    """The accuracy matrix of a sequence of tasks as a metric, and what follows from it.

    Its state is the matrix as sums and counts of scores, with one row more for the model that has learned nothing, so it adds up over batches and
    processes.

    Args:
        tasks: How many there are.
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
            task: Which task they belong to, from 0.
            stage: After which task they were taken, from 0; None for the model that has learned nothing.

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
        """The matrix so far: float64 of shape (stages, tasks), rows up to the last stage measured, NaN where nothing was."""
        measured = self.counts[1:].sum(1).nonzero()
        return self._means[1 : 1 + (int(measured.max()) + 1 if len(measured) else 0)]

    @property
    def reference(self) -> Tensor:
        """Scores of the model that has learned nothing: float64 of shape (tasks,), NaN where there is none."""
        return self._means[0]

    def compute(self) -> dict[str, Tensor]:
        """The figures of ``summary`` as float64 scalars; absent where one has no value."""
        found = summary(self.accuracies, self.reference)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items() if value is not None}

    @property
    def _means(self) -> Tensor:
        # Nothing divided by nothing is NaN, which is how the matrix says that there was no measurement.
        return self.sums / self.counts


def _checked(accuracies: Matrix) -> Tensor:
    matrix = torch.as_tensor(accuracies, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.shape[0] > matrix.shape[1]:
        raise LataError(
            f"the accuracy matrix must have a row per stage and a column per task, no more rows than columns; it has {tuple(matrix.shape)}"
        )
    return matrix


def _mean(scores: Tensor) -> float | None:
    found = float(scores.mean())
    return None if found != found else found
