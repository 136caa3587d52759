"""Merging coefficients in closed form, module by module, from a few samples of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.layers import Level
from lata_lightning.linearity.module_calls import ModuleCall, ModuleRuns
from lata_lightning.linearity.samples import Batch, check_samples, few_positions, row_count
from lata_lightning.linearity.solution import LayerFit, Solution, SolvedVector
from lata_lightning.linearity.start import StartModel
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector

DEFAULT_RIDGE = 1e-6
"""Default of ``ridge`` where it is fitted with samples, here and in ``regress``; without samples it is that of ``Settings``."""
# Positions whose outputs are multiplied at once, so that their float64 copies are small compared with the hidden states.
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
        """Add changes of shape (vectors, positions, width), measured on samples of a task."""
        self._positions[task] += changes.shape[1]
        for chunk in torch.split(changes, _CHUNK, dim=1):
            flat = chunk.reshape(len(chunk), -1).double()
            self._sums[task] += (flat @ flat.T).numpy()

    def solve(self, ridge: float) -> tuple[list[float], LayerFit]:
        """Return the coefficient of each vector, and the quality of the solution; all coefficients are 1 where no vector changes the output.

        Args:
            ridge: Added to the diagonal, in units of its mean. With 0, the smallest of equally good solutions is taken.

        Raises:
            CorruptFileError: A sum is not finite.
        """
        # A task without positions does not count.
        means = self._sums / np.maximum(self._positions, 1)[:, None, None]
        if not np.isfinite(means).all():
            raise CorruptFileError("NaN or infinite hidden states")
        matrix = means.sum(axis=0)
        count = len(matrix)
        aim = np.array([means[:, s, :].diagonal().sum() for s in range(count)])
        own = float(sum(means[task, task, task] for task in range(count)))
        if np.trace(matrix) == 0:
            return [1.0] * count, LayerFit(None, None)
        solved = matrix + ridge * np.trace(matrix) / count * np.eye(count)
        coefficients, *_ = np.linalg.lstsq(solved, aim, rcond=None)
        condition = float(np.linalg.cond(solved))
        residual = None if own == 0 else max(0.0, float(coefficients @ matrix @ coefficients - 2 * coefficients @ aim + own) / own)
        return [float(number) for number in coefficients], LayerFit(condition if np.isfinite(condition) else None, residual)


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
    """Solve for the coefficients with which the merged output of each layer is closest, on each task's samples, to the output with that task's vector.

    For each layer, with Δ_s(x) = f(x; start + vector_s) − f(x; start) and x the hidden states of the start model, they minimise
    Σ_t E_{x∼task t} ‖Σ_s coefficient_s Δ_s(x) − Δ_t(x)‖². Every task has the same weight, however many samples it has; padding does not count. The model
    runs block by block: the hidden states of all samples, the tensors outside the blocks, and one block of the start and of each vector are in memory.

    Args:
        start: Directory or hub id of a transformers model, or a module, which does not change. Dropout is off.
        vectors: Task vectors from this start; their coefficients are ignored.
        samples: For each vector, batches of inputs of the model by argument name: rows of its task, with an ``attention_mask`` if they are padded. They
            should have about twice as many positions as the widest layer has inputs. The batch size only affects memory.
        level: ``block``, or ``submodule`` for attention, cross-attention and MLP of each block separately.
        outside: Coefficient of everything else: tensors outside the blocks and, at level ``submodule``, norms and other parts inside them.
        ridge: Added to the diagonal of the solved matrix, in units of its mean.
        check_base: Refuse vectors that are known to start from different weights.
        progress: Called after each block is read.
        note: Called, before the model runs, with a sentence about each task whose samples have too few positions for the widest layer.

    Returns:
        One coefficient for each vector and layer, and the quality of each solution. Coefficients are in [0, 1] where outputs are orthogonal, and
        unbounded otherwise; they are 1 for a layer whose output no vector changes.

    Raises:
        LataError: The numbers of samples and vectors differ, a task has no samples, the level is ``tensor``, or the ridge is negative.
        SourceError, LayoutMismatchError, BaseMismatchError, WeightingError: As for ``ModuleRuns``.
        CorruptFileError: Hidden states are not finite.

    Source: submodule linearity, arXiv:2504.10902, closed-form merging. This package's choices: the ridge, equal weight of tasks, and the coefficient
    outside.
    """
    if level not in ("block", "submodule"):
        raise LataError(f"coefficients in closed form are per block or per submodule, not per {level}")
    check_samples(vectors, samples)
    if ridge < 0:
        raise LataError(f"the ridge must not be negative, got {ridge}")
    task_of = [task for task, batches in enumerate(samples) for _ in batches]
    runs = ModuleRuns(start, vectors, [batch for batches in samples for batch in batches], check_base=check_base)
    if note is not None:
        for sentence in few_positions(runs.model, runs.blocks, [vector.label for vector in vectors], samples):
            note(sentence)
    modules = runs.blocks.layer_modules(level)
    products = {module.layer: Products(len(vectors)) for module in modules}

    def visit(call: ModuleCall) -> None:
        changes = [call.with_weights(vector, 1.0) - call.outputs for vector in range(len(vectors))]
        products[call.layer.layer].add(task_of[call.batch], torch.stack(changes))

    runs.run(modules, visit, progress=progress)
    solved, layers = {}, runs.layers.layers(level)
    for layer, sums in products.items():
        try:
            solved[layer] = sums.solve(ridge)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error} in {layer}, from the weights of the start or of a vector") from error
    return Solution(
        level=level,
        outside=outside,
        ridge=ridge,
        start=Identity(runs.source.location, runs.source.revision),
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
