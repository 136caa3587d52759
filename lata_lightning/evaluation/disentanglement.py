"""Weight disentanglement: whether two task vectors can be added to one model without disturbing each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.evaluation.weight_functions import Outputs, WeightFunction, check_scales, model_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Distance = Literal["prediction", "representation"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
GRID = tuple(round(-2 + 0.2 * step, 1) for step in range(21))
"""The default scales of both axes: 21 points in [-2, 2], including 0 and 1."""


@dataclass(frozen=True)
class Disentanglement:
    """The weight disentanglement error on a grid.

    Attributes:
        scales_1, scales_2: Scales of the first and of the second task vector: rows and columns.
        by_task: Mean distance over the samples of each task, float64 of shape (2, rows, columns).
        samples: Number of samples of each task.
        distance: The distance between outputs.
    """

    scales_1: tuple[float, ...]
    scales_2: tuple[float, ...]
    by_task: Tensor
    samples: tuple[int, int]
    distance: Distance

    @property
    def error(self) -> Tensor:
        """ξ at every point, float64 of shape (rows, columns): in [0, 2] for predictions, at least 0 for representations."""
        return self.by_task.sum(0)


def disentanglement_error(
    model: nn.Module,
    task_vectors: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Iterable[Any]],
    *,
    start: Mapping[str, Tensor] | None = None,
    scales_1: Sequence[float] = GRID,
    scales_2: Sequence[float] = GRID,
    distance: Distance = "prediction",
    outputs: Outputs = model_outputs,
) -> Disentanglement:
    """Compute ξ(scale_1, scale_2) = Σ_t E_{x∼μ_t} dist( f(x; θ0 + scale_t τ_t), f(x; θ0 + scale_1 τ1 + scale_2 τ2) ) on a grid.

    0 where each vector acts on the data of its own task only. At (0, 0) it is always 0; along an axis the term of that axis's task is always 0.

    Args:
        model: Has the weights θ0 unless ``start`` is given; in evaluation mode while this runs, and otherwise unchanged.
        task_vectors: τ1 and τ2 by parameter name, such as two TaskVectors. Parameters that a vector lacks do not change.
        batches: The batches of task 1 and of task 2; each iterable is read once and stored.
        start: θ0 by parameter name.
        scales_1: Scales of the first vector.
        scales_2: Scales of the second vector.
        distance: ``"prediction"``: 1 where the index of the largest output differs. ``"representation"``: half the symmetric Kullback-Leibler
            divergence, in nats, between the outputs after a softmax; return the features of the encoder from ``outputs``.
        outputs: Takes model and batch, and returns a tensor of shape (…, classes or features), one row for each sample. Leave padding out.

    Returns:
        The errors on the grid. The model runs (rows · columns) times over both data sets, and (rows + columns) times over one.

    Raises:
        LataError: Not two vectors and two data sets, no scales, an unknown distance, or a task without samples.
        LayoutMismatchError: A vector does not belong to the model.

    Source: Ortiz-Jimenez et al., arXiv:2305.12827, section 3; the representation level, arXiv:2407.07089.
    """
    if len(task_vectors) != 2 or len(batches) != 2:
        raise LataError(
            f"disentanglement is between two tasks: two task vectors and two data sets, got {len(task_vectors)} and {len(batches)}"
        )
    metric = DisentanglementError(scales_1, scales_2, distance)
    function = WeightFunction(model, start, outputs)
    vectors = [function.load(vector, f"task vector {number}") for number, vector in enumerate(task_vectors, start=1)]
    data = [list(each) for each in batches]
    axes = (metric.scales_1, metric.scales_2)
    with function.evaluating():
        alone: list[list[list[Tensor]]] = []
        for vector, scales, own in zip(vectors, axes, data, strict=True):
            alone.append([[_needed(function(function.at([vector], [scale]), batch), distance) for batch in own] for scale in scales])
        for row, scale_1 in enumerate(metric.scales_1):
            for column, scale_2 in enumerate(metric.scales_2):
                weights = function.at(vectors, [scale_1, scale_2])
                for task, position in enumerate((row, column)):
                    for before, batch in zip(alone[task][position], data[task], strict=True):
                        metric.add(task, row, column, before, _needed(function(weights, batch), distance))
    counts = metric.samples[:, 0, 0].tolist()
    if 0 in counts:
        raise LataError(f"each of the two tasks needs at least one sample, got {counts[0]} and {counts[1]}")
    return Disentanglement(*axes, by_task=metric.by_task(), samples=(counts[0], counts[1]), distance=metric.distance)


class DisentanglementError(Metric):
    """ξ on a grid as a torchmetrics metric; its states are sums, so it adds up over batches, epochs and processes.

    Args:
        scales_1: Scales of the first task vector, one for each row.
        scales_2: Scales of the second task vector, one for each column.
        distance: ``"prediction"`` or ``"representation"``; see ``disentanglement_error``.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Attributes:
        sums: Sums of distances, float64 of shape (2, rows, columns).
        samples: Number of samples in each sum, int64 of the same shape.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor
    samples: Tensor

    def __init__(
        self, scales_1: Sequence[float] = GRID, scales_2: Sequence[float] = GRID, distance: Distance = "prediction", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if distance not in DISTANCES:
            raise LataError(f"unknown distance {distance!r}; choose one of {', '.join(DISTANCES)}")
        self.distance = distance
        self.scales_1, self.scales_2 = check_scales(scales_1), check_scales(scales_2)
        shape = (2, len(self.scales_1), len(self.scales_2))
        self.add_state("sums", default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: int, row: int, column: int, alone: Tensor, together: Tensor) -> None:
        """Add samples of one task at one point of the grid.

        Args:
            task: The task of the samples, 0 or 1.
            row: Index of scale_1 in ``scales_1``.
            column: Index of scale_2 in ``scales_2``.
            alone: Outputs with only this task's vector, at its scale: shape (…, classes or features).
            together: Outputs on the same samples with both vectors, of the same shape.

        Raises:
            LataError: There is no such task or point.
            LayoutMismatchError: The shapes differ.
        """
        rows, columns = len(self.scales_1), len(self.scales_2)
        if not (0 <= task < 2 and 0 <= row < rows and 0 <= column < columns):
            raise LataError(
                f"task, row and column must lie in 2 tasks and a grid of {rows} × {columns} points, got {task}, {row} and {column}"
            )
        if alone.shape != together.shape:
            raise LayoutMismatchError(
                f"outputs on the same samples must have one shape, got {tuple(alone.shape)} and {tuple(together.shape)}"
            )
        self.add(task, row, column, _needed(alone, self.distance), _needed(together, self.distance))

    def add(self, task: int, row: int, column: int, alone: Tensor, together: Tensor) -> None:
        """Add samples as ``update`` does, from outputs that have gone through ``_needed``."""
        added = distances(alone, together, self.distance)
        self.sums[task, row, column] += added.sum().to(self.sums.device)
        self.samples[task, row, column] += added.numel()

    def by_task(self) -> Tensor:
        """Return the mean distance over the samples of each task, float64 of shape (2, rows, columns); NaN where there are none."""
        return self.sums / self.samples

    def compute(self) -> Tensor:
        """Return ξ at every point, float64 of shape (rows, columns); NaN where a task has no samples."""
        return self.by_task().sum(0)


def distances(alone: Tensor, together: Tensor, distance: Distance) -> Tensor:
    """Return the distance of each sample, float64.

    Args:
        alone: For predictions, the predicted classes; for representations, log-probabilities in the last dimension.
        together: The same with both vectors; same shape.
        distance: ``"prediction"`` or ``"representation"``.

    Returns:
        For predictions 1 where the classes differ, else 0; for representations ½ Σ (p − q)(log p − log q), 0 or more.
    """
    if distance == "prediction":
        return (alone != together).double().flatten()
    # Where both probabilities are exactly zero, the logarithms are infinite but the term is zero.
    terms = torch.where(alone == together, 0.0, (alone.exp() - together.exp()) * (alone - together))
    return (terms.sum(-1) / 2).flatten()


def heat_map(errors: Disentanglement, path: str | Path | None = None) -> Figure:
    """Draw the error over the grid, with scale_1 on the x axis and scale_2 on the y axis.

    Args:
        errors: At least two scales on each axis.
        path: File to write the figure to; its ending decides the format.

    Raises:
        LataError: matplotlib is not installed, or an axis has a single scale.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LataError("a heat map needs matplotlib; install lata_lightning[report]") from error
    if min(len(errors.scales_1), len(errors.scales_2)) < 2:
        raise LataError(f"a heat map needs at least two scales on each axis, got {len(errors.scales_1)} and {len(errors.scales_2)}")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(errors.scales_1, errors.scales_2, errors.error.T.numpy(), vmin=0, shading="nearest", cmap="viridis")
    axes.set(xlabel="scale_1", ylabel="scale_2", title=f"weight disentanglement error, {errors.distance} level", aspect="equal")
    # The region in which scales are searched.
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="white", linewidth=1)
    figure.colorbar(mesh, ax=axes)
    if path is not None:
        figure.savefig(path)
    return figure


def _needed(outputs: Tensor, distance: Distance) -> Tensor:
    """Return the part of the outputs that a distance needs, which takes far less memory than all outputs of every scale."""
    return outputs.argmax(-1) if distance == "prediction" else outputs.double().log_softmax(-1)
