"""Samples of tasks, and whether they have enough positions for the layers that they determine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lata_lightning.errors import LataError
from lata_lightning.linearity.blocks import Blocks
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.vectors.task_vector import TaskVector

Batch = Mapping[str, Tensor]
"""Inputs of a model by argument name."""
POSITIONS_PER_WIDTH = 2
"""With fewer positions for each input of the widest layer, some of its inputs hardly occur."""


def check_samples(vectors: Sequence[TaskVector], samples: Sequence[Sequence[Batch]]) -> None:
    """Refuse samples that are not one set for each vector.

    Raises:
        LataError: The numbers of sets and vectors differ, or a task has no samples.
    """
    if len(samples) != len(vectors):
        raise LataError(
            f"every vector needs the samples of its own task, in the same order: got {len(samples)} sets for {len(vectors)} vectors"
        )
    empty = [vector.label for vector, batches in zip(vectors, samples, strict=True) if not batches]
    if empty:
        raise LataError(f"every task needs samples; there are none for {', '.join(empty[:3])}")


def row_count(batches: Sequence[Batch]) -> int:
    """Return the number of rows in all batches."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def widest_input(model: ModelWeights, blocks: Blocks) -> int:
    """Return the largest number of inputs of a linear layer of the blocks; 0 where there is none."""
    inside = [model.module.get_submodule(path) for path in blocks.tensors]
    layers = [module for block in inside for module in block.modules()]
    widths = [layer.in_features for layer in layers if isinstance(layer, nn.Linear)]
    return max([*widths, *(int(layer.weight.shape[0]) for layer in layers if isinstance(layer, Conv1D))], default=0)


def positions_of(batches: Sequence[Batch]) -> int | None:
    """Return the number of positions in all batches without padding; None where the inputs are not tokens."""
    total = 0
    for batch in batches:
        if "input_ids" not in batch:
            return None
        mask = batch.get("attention_mask")
        total += batch["input_ids"].numel() if mask is None else int(mask.sum())
    return total


def few_positions(model: ModelWeights, blocks: Blocks, labels: Sequence[str], samples: Sequence[Sequence[Batch]]) -> Iterator[str]:
    """Yield one sentence for each task whose samples have fewer positions than twice the width of the widest layer.

    Args:
        model: The start model.
        blocks: The blocks of the start model.
        labels: Name of the vector of each task.
        samples: Batches of each task.
    """
    width = widest_input(model, blocks)
    wanted = POSITIONS_PER_WIDTH * width
    for label, batches in zip(labels, samples, strict=True):
        positions, rows = positions_of(batches), row_count(batches)
        if positions is not None and 0 < positions < wanted:
            yield (
                f"the samples for {label} have {positions} positions, and the widest layer takes in {width} numbers: fewer than {wanted} positions do not "
                f"determine it well. Give about {math.ceil(wanted * rows / positions)} rows of this length (--samples)."
            )
