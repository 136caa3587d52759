"""Which process of a run counts which part of each tensor, found by agreement of all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lata_lightning.errors import LataError, first_three
from lata_lightning.live.placements.placement import Placement
from lata_lightning.live.placements.region import Region
from lata_lightning.live.ranks import Ranks


class Ownership:
    """Which process owns which part of each tensor: each entry is owned by exactly one process of the run.

    Of a replicated tensor one process owns everything, in turn by name; buffers all belong to the first. Of others each part is owned by the lowest
    rank that has it. Every process has to make one at the same time.

    Args:
        placements: The tensors on this process, the same names in the same order on every process.
        ranks: The processes.

    Raises:
        LataError: The processes have other tensors, or the parts they have of a tensor overlap or leave entries out.
    """

    def __init__(self, placements: Mapping[str, Placement], ranks: Ranks) -> None:
        self._ranks = ranks
        own = {name: None if placement.replicated else placement.region for name, placement in placements.items()}
        everywhere = ranks.gathered(own)
        _check_same_names(everywhere)
        self._owners: dict[str, tuple[tuple[int, Region], ...]] = {}
        self._index = {name: index for index, name in enumerate(placements)}
        self._copies: dict[str, int] = {}
        checked: dict[tuple[Region, ...], bool] = {}
        wrong = []
        for index, (name, placement) in enumerate(placements.items()):
            if all(regions[name] is None for regions in everywhere):
                owner = 0 if placement.is_buffer else index % ranks.world
                self._owners[name] = ((owner, Region.whole(placement.shape)),)
                self._copies[name] = ranks.world
                continue
            lowest: dict[Region, int] = {}
            for rank, regions in enumerate(everywhere):
                lowest.setdefault(regions[name] or Region.whole(placement.shape), rank)
            owned = tuple((rank, region) for region, rank in lowest.items() if region.entries)
            parts = tuple(region for _, region in owned)
            if parts not in checked:
                checked[parts] = _tiles(parts, math.prod(placement.shape))
            if not checked[parts]:
                wrong.append(f"{name} ({sum(part.entries for part in parts)} of {math.prod(placement.shape)} entries)")
            self._owners[name] = owned
            self._copies[name] = sum(regions[name] == parts[0] for regions in everywhere) if len(parts) == 1 else 0
        if wrong:
            raise LataError(
                f"the parts of a tensor that the processes have must make up the tensor, each entry once, and those of {len(wrong)} tensors do not, "
                f"{first_three(wrong)}. Leave them out (leave_out=[…]), or shard them with fully_shard or parallelize_module."
            )

    def counts(self, name: str) -> bool:
        """Return whether this process owns the part of a tensor that lies on it."""
        return any(rank == self._ranks.rank for rank, _ in self._owners[name])

    def leads(self, name: str) -> bool:
        """Return whether this process, and no other, counts what is added to a tensor as a whole, such as factors of an adapter."""
        return self._index[name] % self._ranks.world == self._ranks.rank

    def copies(self, name: str) -> int:
        """Return how many processes have all of a tensor; 0 if it is cut into parts."""
        return self._copies[name]

    def gather(self, name: str, values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a whole tensor from the parts that its owners have. Every process has to call this.

        Args:
            name: Name of the tensor.
            values: The values that this process owns; None where it owns none.
            shape: Shape of the whole tensor.
            dtype: Dtype of the whole tensor.

        Returns:
            The tensor on the CPU of rank zero; on other processes its values are undefined.
        """
        collects = self._ranks.rank == 0
        found = torch.empty(shape, dtype=dtype) if collects else torch.empty(0, dtype=dtype)
        for rank, region in self._owners[name]:
            part = torch.empty(region.size, dtype=dtype) if values is None or rank != self._ranks.rank else values.to(dtype)
            part = self._ranks.from_rank(part, rank)
            if collects:
                region.of(found).copy_(part)
        return found


def _check_same_names(everywhere: list[dict[str, Region | None]]) -> None:
    every = set().union(*everywhere)
    lacking = [f"{name} (not on process {rank})" for rank, names in enumerate(everywhere) for name in sorted(every - names.keys())]
    if lacking:
        raise LataError(
            f"every process must have the same tensors, or parts of them, and some lack {first_three(lacking)}. Pipeline parallelism is not "
            "supported; leave out what only some processes have (leave_out=[…])."
        )


def _tiles(parts: tuple[Region, ...], entries: int) -> bool:
    """Whether distinct regions make up a tensor with so many entries, each once."""
    if sum(part.entries for part in parts) != entries or len({part.shape for part in parts}) > 1:
        return False
    # Sorted by their first bounds, so that most pairs need no look.
    ordered = sorted(parts, key=lambda part: part.bounds)
    for index, part in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.bounds and other.bounds[0][0] >= part.bounds[0][1]:
                break
            if part.overlap(other) is not None:
                return False
    return True
