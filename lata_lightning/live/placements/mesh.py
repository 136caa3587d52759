"""Tensors on device meshes: FSDP2, tensor parallelism, and both together, beside plain tensors that every process has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from typing_extensions import override

from lata_lightning.errors import LataError
from lata_lightning.layers import unwrapped
from lata_lightning.live.placements.placement import Placement, Strategy, empty_template
from lata_lightning.live.placements.region import Region
from lata_lightning.live.placements.replicated import Replicated
from lata_lightning.store.checkpoint_names import tied_groups


class MeshShard(Placement):
    """The part of a DTensor that lies on this process.

    Args:
        tensor: The DTensor.
        trains: Whose ``requires_grad`` counts, where it is not that of the DTensor.
    """

    def __init__(self, tensor: DTensor, trains: Tensor | None = None) -> None:
        self._tensor, self._trains = tensor, tensor if trains is None else trains
        self._region = region_of(tensor)
        self._template = empty_template(self.shape, tensor.dtype)

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

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
    def replicated(self) -> bool:
        return False

    @property
    @override
    def changes(self) -> bool:
        return self.is_buffer or self._trains.requires_grad

    @property
    @override
    def is_buffer(self) -> bool:
        return not isinstance(self._trains, nn.Parameter)

    @property
    @override
    def materialized(self) -> bool:
        return not self._tensor.is_meta

    @property
    @override
    def template(self) -> Tensor:
        return self._template

    @override
    def values(self) -> Tensor:
        return self._tensor.to_local().detach()

    @override
    def rounded(self, start: Tensor) -> Tensor:
        return start.to(self.dtype)

    @override
    def keeps(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype


class MeshStrategy(Strategy):
    """DTensors and plain tensors: FSDP2, tensor parallelism, DDP and one device."""

    @override
    def parameters(self, module: nn.Module) -> dict[str, Placement]:
        # The method of nn.Module is called, as that of the module may be overridden and need not take arguments.
        named = nn.Module.named_parameters(module)
        return {unwrapped(name): self.of(parameter) for name, parameter in named if parameter.is_floating_point()}

    @override
    def of(self, parameter: Tensor) -> Placement:
        return MeshShard(parameter) if isinstance(parameter, DTensor) else Replicated(parameter)

    @override
    def whole(self, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()

    @override
    def ties(self, module: nn.Module) -> Iterable[Iterable[str]]:
        return tied_groups(module)


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
    axes = [(placement, axis, place) for axis, (placement, place) in enumerate(zip(tensor.placements, coordinates, strict=True))]
    cut = [(placement, axis, place) for placement, axis, place in axes if not placement.is_replicate()]
    plain = [(placement.dim, axis, place) for placement, axis, place in cut if type(placement) is Shard]
    strided = [(placement.dim, axis, place) for placement, axis, place in cut if isinstance(placement, _StridedShard)]
    bounds = [(0, length) for length in tensor.shape]
    for dim, axis, place in [*plain, *strided]:
        begin, end = bounds[dim]
        length = -(-(end - begin) // mesh.size(axis))
        first = min(begin + place * length, end)
        bounds[dim] = (first, min(first + length, end))
    region = Region(tuple(tensor.shape), tuple(bounds))
    if len(plain) + len(strided) != len(cut) or tuple(tensor.to_local().shape) != region.size:
        raise LataError(
            f"LATACallback measures tensors that are cut in contiguous parts, and a tensor of shape {tuple(tensor.shape)} is placed as "
            f"{tensor.placements} on a mesh of {tuple(mesh.shape)}. Use fully_shard, parallelize_module, or both, in that order of the mesh."
        )
    return region
