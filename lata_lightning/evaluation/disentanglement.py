"""Weight disentanglement: whether two task vectors act on one model without disturbing each other."""

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
"""The default scales of both axes: 21 points in [-2, 2], 0 and 1 among them."""


@dataclass(frozen=True)
class Disentanglement:
    """The weight disentanglement error on a grid.

    Attributes:
        scales_1, scales_2: Scales of the first and of the second task vector: rows and columns.
        by_task: Mean distance over the samples of each task, float64 of shape (2, rows, columns).
        samples: How many samples of each task were used.
        distance: What was compared.
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
    """ξ(scale_1, scale_2) = Σ_t E_{x∼μ_t} dist( f(x; θ0 + scale_t τ_t), f(x; θ0 + scale_1 τ1 + scale_2 τ2) ) on a grid.

    0 where each vector acts on the data of its own task only: at (0, 0) always, and along an axis always in the share of the task of that axis.

    Args:
        model: Holds θ0 unless ``start`` is given; in evaluation mode while this runs, and otherwise unchanged.
        task_vectors: τ1 and τ2 by parameter name, such as two TaskVectors. Parameters that a vector lacks do not move.
        batches: Of task 1 and of task 2; gone through once, and kept.
        start: θ0 by parameter name.
        scales_1: Of the first vector.
        scales_2: Of the second.
        distance: ``"prediction"``: 1 where the largest output is another one. ``"representation"``: half the symmetric Kullback-Leibler
            divergence, in nats, between the outputs after a softmax; give the features of the encoder as outputs.
        outputs: From model and batch to a tensor of shape (…, classes or features); each of its rows is a sample. Leave padding out.

    Returns:
        Errors on the grid. The model runs (rows · columns) times over both data sets, and (rows + columns) times over one.

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
                for task, place in enumerate((row, column)):
                    for before, batch in zip(alone[task][place], data[task], strict=True):
                        metric.add(task, row, column, before, _needed(function(weights, batch), distance))
    counts = metric.samples[:, 0, 0].tolist()
    if 0 in counts:
        raise LataError(f"each of the two tasks needs at least one sample, got {counts[0]} and {counts[1]}")
    return Disentanglement(*axes, by_task=metric.by_task(), samples=(counts[0], counts[1]), distance=metric.distance)


class DisentanglementError(Metric):
    """ξ on a grid as a metric: its states are sums, so it adds up over batches, epochs and processes.

    Args:
        scales_1: Scales of the first task vector: rows.
        scales_2: Scales of the second: columns.
        distance: ``"prediction"`` or ``"representation"``; see ``disentanglement_error``.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Attributes:
        sums: Sum of distances, float64 of shape (2, rows, columns).
        samples: How many samples that are, int64 of the same shape.
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
            task: 0 or 1: whose samples these are.
            row: LayerPosition of scale_1 in ``scales_1``.
            column: LayerPosition of scale_2 in ``scales_2``.
            alone: Outputs with this task's vector alone, at its scale: shape (…, classes or features).
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
        """As ``update``, with outputs that are reduced to what the distance needs already."""
        found = distances(alone, together, self.distance)
        self.sums[task, row, column] += found.sum().to(self.sums.device)
        self.samples[task, row, column] += found.numel()

    def by_task(self) -> Tensor:
        """Mean distance over the samples of each task, float64 of shape (2, rows, columns); NaN where there are none."""
        return self.sums / self.samples

    def compute(self) -> Tensor:
        """ξ at every point, float64 of shape (rows, columns); NaN where a task has no samples."""
        return self.by_task().sum(0)


def distances(alone: Tensor, together: Tensor, distance: Distance) -> Tensor:
    """Distance of each sample, float64.

    Args:
        alone: For predictions, the chosen classes; for representations, logarithms of probabilities in the last dimension.
        together: Of the same shape.
        distance: Which.

    Returns:
        For predictions 1 where the classes differ, else 0; for representations ½ Σ (p − q)(log p − log q), 0 or more.
    """
    if distance == "prediction":
        return (alone != together).double().flatten()
    # Where both are exactly zero, so is their share of the sum: the logarithms are infinite there.
    terms = torch.where(alone == together, 0.0, (alone.exp() - together.exp()) * (alone - together))
    return (terms.sum(-1) / 2).flatten()


def heat_map(found: Disentanglement, path: str | Path | None = None) -> Figure:
    """The error over the grid as a figure, scale_1 to the right and scale_2 upwards.

    Args:
        found: At least two scales on each axis.
        path: Where to write it too; the ending decides the format.

    Raises:
        LataError: matplotlib is not installed, or an axis has a single scale.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LataError("a heat map needs matplotlib; install lata_lightning[report]") from error
    if min(len(found.scales_1), len(found.scales_2)) < 2:
        raise LataError(f"a heat map needs at least two scales on each axis, got {len(found.scales_1)} and {len(found.scales_2)}")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(found.scales_1, found.scales_2, found.error.T.numpy(), vmin=0, shading="nearest", cmap="viridis")
    axes.set(xlabel="scale_1", ylabel="scale_2", title=f"weight disentanglement error, {found.distance} level", aspect="equal")
    # The region in which scales are looked for.
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="white", linewidth=1)
    figure.colorbar(mesh, ax=axes)
    if path is not None:
        figure.savefig(path)
    return figure


def _needed(outputs: Tensor, distance: Distance) -> Tensor:
    """What a distance needs of outputs: keeping it takes far less memory than the outputs of every scale."""
    return outputs.argmax(-1) if distance == "prediction" else outputs.double().log_softmax(-1)
