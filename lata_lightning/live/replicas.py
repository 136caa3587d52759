"""Whether the tensors that every process of a run has whole are copies of each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import LataError, first_three
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.ranks import Ranks
from lata_lightning.store.hashing import value_sums

_SAMPLE = 1024
"""Entries of a tensor by which copies of it are compared during training."""
_PRINTS = 1 << 12
"""Different values of a print: few enough for sums of their squares over 4096 processes to be exact in float64."""


def check_replicas(live: LiveModel, ranks: Ranks) -> None:
    """Refuse plain parameters that differ between processes, such as experts of which each process has its own.

    Only parameters that training can change count, and factors of adapters. Every process has to call this.

    Raises:
        LataError: Some have other values on another process.
    """
    if ranks.world == 1:
        return
    sums: dict[str, Any] = {}
    for name in sorted(set(live.changing) - live.buffers):
        if name in live.adapted:
            sums[name] = [value_sums(side).tolist() for part in live.added(name).parts for side in (part.left, part.right)]
        elif live.placement(name).replicated:
            sums[name] = value_sums(live.placement(name).values()).tolist()
    everywhere = ranks.gathered(sums)
    wrong = [name for name in sums if any(other.get(name) != sums[name] for other in everywhere)]
    if wrong:
        raise LataError(
            f"parameters that every process has as a plain tensor must have the same values on all of them, and {len(wrong)} of {len(sums)} differ: "
            f"{first_three(wrong)}. Are they experts of which each process has its own? Make them DTensors (distribute_tensor, fully_shard), or leave "
            "them out (leave_out=[…])."
        )


def sampled_prints(live: LiveModel, copies: Collection[str]) -> Tensor:
    """Return a print of the first entries of each tensor, and its square, whose sums over processes tell whether all have the same.

    Args:
        live: The model.
        copies: Names of the tensors to compare, of which this process has all entries or none.

    Returns:
        Float64 of shape (tensors, 2); zero for other tensors. Two different tensors have one print once in 4096 times.
    """
    prints = torch.zeros(len(live.names), 2, dtype=torch.float64)
    for index, name in enumerate(live.names):
        if name in copies and live.placement(name).region.entries:
            sums = value_sums(live.placement(name).values().reshape(-1)[:_SAMPLE].cpu())
            value = hash(tuple(sums.tolist())) % _PRINTS
            prints[index] = torch.tensor([value, value * value])
    return prints


def differing(names: Sequence[str], summed: Tensor, copies: Mapping[str, int]) -> list[str]:
    """Return the tensors whose prints are not the same on all processes that have them.

    Args:
        names: Name of the tensor of each row of ``summed``.
        summed: Prints and their squares, summed over the processes.
        copies: How many processes have each tensor to compare.
    """
    # Only equal numbers have a mean whose square is the mean of the squares.
    return [
        name
        for name, (value, square) in zip(names, summed.tolist(), strict=True)
        if copies.get(name, 0) * square != value * value and name in copies
    ]
