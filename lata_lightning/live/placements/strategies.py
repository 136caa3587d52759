"""Which strategy a model is trained with."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lata_lightning.live.placements.deepspeed import ZeroStrategy, check_masters, uses_deepspeed
from lata_lightning.live.placements.flat_parameters import FlatStrategy
from lata_lightning.live.placements.mesh import MeshStrategy
from lata_lightning.live.placements.placement import Strategy


def strategy_of(trained: nn.Module) -> Strategy:
    """Return the strategy that spreads a model over the processes.

    Args:
        trained: The model, inside what the strategy has wrapped around it.

    Raises:
        LataError: The strategy does not show the values that the optimizer updates.
    """
    if any(isinstance(part, FullyShardedDataParallel) for part in trained.modules()):
        return FlatStrategy(trained)
    check_masters(trained)
    if uses_deepspeed(trained):
        return ZeroStrategy()
    return MeshStrategy()
