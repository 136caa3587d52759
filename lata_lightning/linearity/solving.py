"""Merging coefficients in closed form: every module by itself, from a few samples of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.layers import Level
from lata_lightning.linearity.positions import few_positions
from lata_lightning.linearity.solution import Fit, Solution, SolvedVector
from lata_lightning.linearity.start import StartModel
from lata_lightning.linearity.walk import Batch, Passage, Walker, check_samples, row_count
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector

DEFAULT_RIDGE = 1e-6
# Positions whose outputs are multiplied at once: their float64 copies stay small beside the hidden states.
_CHUNK = 1024


class Products:
    """Inner products ⟨Δ_s, Δ_u⟩ of the changes of one layer's output, summed over the positions of each task in float64.

    Args:
        count: Number of vectors, and of tasks.
    """

    def __init__(self, count: int) -> None:
        self._sums = np.zeros((count, count, count))
        self._positions = np.zeros(count)

    def add(self, task: int, changes: Tensor) -> None:
        """Take in changes of shape (vectors, positions, width), measured on samples of a task."""
        self._positions[task] += changes.shape[1]
        for piece in torch.split(changes, _CHUNK, dim=1):
            flat = piece.reshape(len(piece), -1).double()
            self._sums[task] += (flat @ flat.T).numpy()

    def solve(self, ridge: float) -> tuple[list[float], Fit]:
        """Coefficients, one per vector, and how well they fit; all 1 where no vector changes the output.

        Args:
            ridge: Added to the diagonal, in units of its mean. With 0, of equally good solutions the smallest is taken.

        Raises:
            CorruptFileError: A sum is not finite.
        """
        # A task without positions has no part in the mean.
        means = self._sums / np.maximum(self._positions, 1)[:, None, None]
        if not np.isfinite(means).all():
            raise CorruptFileError("NaN or infinite hidden states")
        matrix = means.sum(axis=0)
        count = len(matrix)
        aim = np.array([means[:, s, :].diagonal().sum() for s in range(count)])
        own = float(sum(means[task, task, task] for task in range(count)))
        if np.trace(matrix) == 0:
            return [1.0] * count, Fit(None, None)
        solved = matrix + ridge * np.trace(matrix) / count * np.eye(count)
        found, *_ = np.linalg.lstsq(solved, aim, rcond=None)
        condition = float(np.linalg.cond(solved))
        residual = None if own == 0 else max(0.0, float(found @ matrix @ found - 2 * found @ aim + own) / own)
        return [float(number) for number in found], Fit(condition if np.isfinite(condition) else None, residual)


def solve_coefficients(
    start: StartModel,
    vectors: Sequence[TaskVector],
    samples: Sequence[Sequence[Batch]],
    *,
    level: Level = "block",
    outside: float = 1.0,
    ridge: float = DEFAULT_RIDGE,
    check_base: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Solution:
    """Coefficients under which each layer's merged output is closest to what every task's own vector makes of that task's samples.

    Per layer, with Δ_s(x) = f(x; start + vector_s) − f(x; start) and x the hidden states of the start model, they minimise
    Σ_t E_{x∼task t} ‖Σ_s coefficient_s Δ_s(x) − Δ_t(x)‖². Every task weighs the same, however many samples it has; padding does not count. The model is
    run block by block: in memory are the hidden states of all samples, the tensors outside the blocks, and one block of the start and of each vector.

    Args:
        start: Directory or hub id of a transformers model, or a module. Dropout is off, and it does not change.
        vectors: Task vectors from this start. Coefficients they may have do not count.
        samples: For each vector batches of inputs of the model, by argument name: rows of its task, with an ``attention_mask`` where rows are padded;
            in all about twice as many positions as the widest layer takes in numbers. How rows are split into batches makes no difference but memory.
        level: ``block``, or ``submodule`` for attention, cross-attention and MLP of each block separately.
        outside: Coefficient of everything else: tensors outside the blocks and, at level ``submodule``, norms and others inside them.
        ridge: Added to the diagonal of the matrix that is solved, in units of its mean.
        check_base: Refuse vectors that are known to start from different weights.
        progress: Called after each block is read.
        note: Called, before the model runs, with a sentence about every task whose samples have too few positions for the widest layer.

    Returns:
        One coefficient per vector and layer, in [0, 1] where outputs are orthogonal, unbounded otherwise, and how well they fit. A layer whose output no
        vector changes has coefficient 1.

    Raises:
        LataError: Samples and vectors are not equally many, a task has no samples, the level is ``tensor``, or the ridge is negative.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: See ``Walker``.
        CorruptFileError: Hidden states are not finite.

    Source: submodule linearity, arXiv:2504.10902, closed-form merging; ridge, equal task weight and what stays outside are this package's choices.
    """
    if level not in ("block", "submodule"):
        raise LataError(f"coefficients in closed form are per block or per submodule, not per {level}")
    check_samples(vectors, samples)
    if ridge < 0:
        raise LataError(f"the ridge must not be negative, got {ridge}")
    task_of = [task for task, batches in enumerate(samples) for _ in batches]
    walker = Walker(start, vectors, [batch for batches in samples for batch in batches], check_base=check_base)
    if note is not None:
        for sentence in few_positions(walker.shell, walker.blocks, [vector.label for vector in vectors], samples):
            note(sentence)
    units = walker.units(level)
    products = {unit.layer: Products(len(vectors)) for unit in units}

    def visit(passage: Passage) -> None:
        changes = [passage.with_weights(vector, 1.0) - passage.left for vector in range(len(vectors))]
        products[passage.unit.layer].add(task_of[passage.batch], torch.stack(changes))

    walker.walk(units, visit, progress=progress)
    solved, layers = {}, walker.layers.layers(level)
    for layer, sums in products.items():
        try:
            solved[layer] = sums.solve(ridge)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error} in {layer}, from the weights of the start or of a vector") from error
    return Solution(
        level=level,
        outside=outside,
        ridge=ridge,
        start=Identity(walker.source.location, walker.source.revision),
        vectors=tuple(
            SolvedVector(
                vector.label,
                vector.manifest.tuned_identity,
                row_count(samples[number]),
                {layer: solved[layer][0][number] if layer in solved else outside for layer in layers},
            )
            for number, vector in enumerate(vectors)
        ),
        fits={layer: fit for layer, (_, fit) in solved.items()},
    )
