"""Tensors on device meshes: FSDP2, tensor parallelism, and both together, beside plain tensors that every process has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from typing_extensions import override

from lata_lightning.errors import LataError
from lata_lightning.live.placements.placement import PerParameter, Placement, Sharded
from lata_lightning.live.placements.region import Region
from lata_lightning.live.placements.replicated import Replicated


class MeshShard(Sharded):
    """The part of a DTensor that lies on this process.

    Args:
        tensor: The DTensor.
        trains: The tensor whose ``requires_grad`` counts; by default the DTensor itself.
    """

    def __init__(self, tensor: DTensor, trains: Tensor | None = None) -> None:
        super().__init__(tuple(tensor.shape), tensor.dtype, tensor if trains is None else trains)
        self._tensor, self._region = tensor, region_of(tensor)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    @override
    def region(self) -> Region:
        return self._region

    @property
    @override
    def materialized(self) -> bool:
        return not self._tensor.is_meta

    @property
    @override
    def loaded_dtype(self) -> torch.dtype:
        return self.dtype

    @override
    def values(self) -> Tensor:
        return self._tensor.to_local().detach()


class MeshStrategy(PerParameter):
    """DTensors and plain tensors: FSDP2, tensor parallelism, DDP and one device."""

    @override
    def of(self, parameter: Tensor) -> Placement:
        return MeshShard(parameter) if isinstance(parameter, DTensor) else Replicated(parameter)

    @override
    def whole(self, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def region_of(tensor: DTensor) -> Region:
    """Return the entries of a DTensor that lie on this process.

    Chunks are cut as ``torch.chunk`` cuts them, so the last ones may be smaller or empty. Axes of the mesh with plain shards cut first, those with
    strided shards afterwards: this is how FSDP2 shards what tensor parallelism has cut before.

    Raises:
        LataError: The tensor has partial sums, or shards that are no contiguous range along each axis.
    """
    if tensor.is_meta:
        # No weights yet; where they will lie does not matter.
        return Region.whole(tuple(tensor.shape))
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        # A process outside of the mesh has nothing of the tensor.
        return Region(tuple(tensor.shape), tuple((0, 0) for _ in tensor.shape))
    axes = [(placement, axis, coordinate) for axis, (placement, coordinate) in enumerate(zip(tensor.placements, coordinates, strict=True))]
    cut = [(placement, axis, coordinate) for placement, axis, coordinate in axes if not placement.is_replicate()]
    plain = [(placement.dim, axis, coordinate) for placement, axis, coordinate in cut if type(placement) is Shard]
    strided = [(placement.dim, axis, coordinate) for placement, axis, coordinate in cut if isinstance(placement, _StridedShard)]
    bounds = [(0, length) for length in tensor.shape]
    for dim, axis, coordinate in [*plain, *strided]:
        begin, end = bounds[dim]
        length = -(-(end - begin) // mesh.size(axis))
        first = min(begin + coordinate * length, end)
        bounds[dim] = (first, min(first + length, end))
    region = Region(tuple(tensor.shape), tuple(bounds))
    if len(plain) + len(strided) != len(cut) or tuple(tensor.to_local().shape) != region.size:
        raise LataError(
            f"LATACallback measures tensors that are cut in contiguous parts, and a tensor of shape {tuple(tensor.shape)} is placed as "
            f"{tensor.placements} on a mesh of {tuple(mesh.shape)}. Use fully_shard, parallelize_module, or both, in that order of the mesh."
        )
    return region
