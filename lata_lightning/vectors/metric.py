"""Alignment as a torchmetrics metric, in a module of its own, as importing torchmetrics takes longer than most commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lata_lightning.alignment import layer_alignment
from lata_lightning.errors import LayoutMismatchError, first_three
from lata_lightning.layers import LayerMap, Level
from lata_lightning.moments import Start, check_start
from lata_lightning.numerics.measure import moments_table, tensor_sums


class LayerAlignment(Metric):
    """Alignment by layer as a metric: its state is three sums per layer, so it adds up over batches of tensors, shards and ranks.

    Args:
        layers: Which tensor belongs to which layer.
        level: The unit of weighting.
        start: What the fine-tune started from.
        kwargs: Passed on to ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    sums: Tensor

    def __init__(self, layers: LayerMap, level: Level = "block", start: Start = "instruct", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        grouped = layers.layers(level)
        self.start = check_start(start)
        self.layer_names = list(grouped)
        self.rows = {name: row for row, names in enumerate(grouped.values()) for name in names}
        self.add_state("sums", default=torch.zeros(len(grouped), 3, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, task: Mapping[str, Tensor], instruction: Mapping[str, Tensor]) -> None:
        """Add tensors of a vector: each tensor (or shard of one) exactly once between two resets.

        Args:
            task: Tuned minus start by tensor name; names outside the layers are ignored, as they have no alignment.
            instruction: Instruct minus base for the same names.

        Raises:
            LayoutMismatchError: A tensor is on one side only, or the shapes differ.
        """
        lone = set(task) ^ set(instruction)
        if lone:
            raise LayoutMismatchError(f"task and instruction tensors must have the same names; on one side only are {first_three(lone)}")
        for name in task:
            if name in self.rows:
                self.sums[self.rows[name]] += tensor_sums(task[name], instruction[name], start=self.start).to(self.sums.device)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the alignment as a float64 scalar by layer; absent where the instruction vector is zero."""
        table = moments_table(dict(zip(self.layer_names, self.sums, strict=True)))
        return {layer: torch.tensor(value, dtype=torch.float64) for layer, value in layer_alignment(table).items()}
