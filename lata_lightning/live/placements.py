"""Which part of a tensor a process has, and which process of the run counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded

from lata_lightning.errors import LataError, first_three
from lata_lightning.live.ranks import Ranks


class Shard(NamedTuple):
    """The part of a tensor that this process has.

    Attributes:
        local: Its values, not copied.
        slices: Its range in the whole tensor along each axis; None for all of it.
        counted: Whether this process counts it; False for copies of what another process counts. None if all processes have the whole tensor, so
            that they share the counting by name.
    """

    local: Tensor
    slices: tuple[slice, ...] | None = None
    counted: bool | None = None


def shard_of(name: str, tensor: DTensor) -> Shard:
    """Return the local part of a DTensor.

    Chunks are cut as ``torch.chunk`` cuts them, so the last ones may be smaller or empty. A mesh may be smaller than the world: then every other mesh
    of its kind has a copy, and the mesh with rank 0 counts.

    Raises:
        LataError: The tensor is not placed as plain shards and replicas.
    """
    bounds = [(0, length) for length in tensor.shape]
    counted = 0 in tensor.device_mesh.mesh.flatten().tolist()
    coordinates: list[int] = list(tensor.device_mesh.get_coordinate() or [])
    for axis, (placement, coordinate) in enumerate(zip(tensor.placements, coordinates, strict=True)):
        if placement.is_replicate():
            counted = counted and coordinate == 0
            continue
        if type(placement) is not Sharded:
            raise LataError(f"LATACallback cannot measure {name}, which is placed as {placement}; plain shards and replicas are supported")
        begin, end = bounds[placement.dim]
        length = -(-(end - begin) // tensor.device_mesh.size(axis))
        first = min(begin + coordinate * length, end)
        bounds[placement.dim] = (first, min(first + length, end))
    local = tensor.to_local()
    if tuple(local.shape) != tuple(end - begin for begin, end in bounds):
        raise LataError(f"LATACallback cannot measure {name}: its shard has shape {tuple(local.shape)}, where {bounds} was expected")
    return Shard(local, tuple(slice(begin, end) for begin, end in bounds), counted)


def check_counted_once(shards: Mapping[str, Shard], counts: Callable[[str], bool], sizes: Mapping[str, int], ranks: Ranks) -> None:
    """Refuse a run in which the counted parts of a tensor do not add up to the tensor. Every process has to call this.

    Args:
        shards: The part of each tensor that this process has, in the same order on every process.
        counts: Whether this process counts its part of a tensor.
        sizes: Entries of each whole tensor.
        ranks: The processes.

    Raises:
        LataError: Entries of a tensor are counted by several processes, or by none.
    """
    counted = [shard.local.numel() if counts(name) else 0 for name, shard in shards.items()]
    in_all = ranks.total(torch.tensor(counted, dtype=torch.int64)).tolist()
    wrong = [f"{name} ({found} of {sizes[name]})" for name, found in zip(shards, in_all, strict=True) if found != sizes[name]]
    if wrong:
        raise LataError(
            f"LATACallback cannot measure this run: the parts of {len(wrong)} tensors that the processes count do not add up to the tensor, "
            f"{first_three(wrong)}. Are there parameters that only some processes have, as under pipeline parallelism? Leave them out (leave_out=[…])."
        )
