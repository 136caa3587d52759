"""Whether samples have enough positions for the layers they are to determine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from lata_lightning.linearity.shell import Shell
from lata_lightning.linearity.units import Blocks
from lata_lightning.linearity.walk import Batch, row_count

POSITIONS_PER_WIDTH = 2
"""Positions for each number that the widest layer takes in, below which some of its inputs are hardly seen."""


def widest_input(shell: Shell, blocks: Blocks) -> int:
    """The most numbers that a linear layer of the blocks takes in; 0 where there is none."""
    inside = [shell.model.get_submodule(path) for path in blocks.tensors]
    layers = [module for block in inside for module in block.modules()]
    widths = [layer.in_features for layer in layers if isinstance(layer, nn.Linear)]
    return max([*widths, *(int(layer.weight.shape[0]) for layer in layers if isinstance(layer, Conv1D))], default=0)


def positions_of(batches: Sequence[Batch]) -> int | None:
    """Positions in all batches without padding; None where the inputs are no tokens."""
    total = 0
    for batch in batches:
        if "input_ids" not in batch:
            return None
        mask = batch.get("attention_mask")
        total += batch["input_ids"].numel() if mask is None else int(mask.sum())
    return total


def few_positions(shell: Shell, blocks: Blocks, labels: Sequence[str], samples: Sequence[Sequence[Batch]]) -> Iterator[str]:
    """One sentence for each task whose samples have fewer positions than twice the width of the widest layer.

    Args:
        shell: The start model.
        blocks: Its blocks.
        labels: Name of the vector of each task.
        samples: Batches by task.
    """
    width = widest_input(shell, blocks)
    wanted = POSITIONS_PER_WIDTH * width
    for label, batches in zip(labels, samples, strict=True):
        positions, rows = positions_of(batches), row_count(batches)
        if positions is not None and 0 < positions < wanted:
            yield (
                f"the samples for {label} have {positions} positions, and the widest layer takes in {width} numbers: fewer than {wanted} positions do not "
                f"determine it well. Give about {math.ceil(wanted * rows / positions)} rows of this length (--samples)."
            )
