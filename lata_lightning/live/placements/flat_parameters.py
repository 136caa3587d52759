"""Parameters that FSDP1 packs into flat ones: ``FSDPStrategy``, ``strategy="fsdp"``, ``FullyShardedDataParallel``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lata_lightning.errors import LataError
from lata_lightning.layers import unwrapped
from lata_lightning.live.placements.mesh import region_of
from lata_lightning.live.placements.placement import Placement, Sharded, Strategy
from lata_lightning.live.placements.region import Region
from lata_lightning.live.placements.replicated import Replicated


class RowShard(Sharded):
    """The rows of a parameter that a sharded state dict gives to this process.

    Args:
        values: The rows.
        region: Position of the rows in the parameter.
        shape: Shape of the whole parameter.
        parameter: The tensor that asks for the gradient: the parameter itself, or the flat one that it is packed into.
    """

    def __init__(self, values: Tensor, region: Region, shape: tuple[int, ...], parameter: Tensor) -> None:
        super().__init__(shape, values.dtype, parameter)
        self._values, self._region = values.detach(), region

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    @override
    def region(self) -> Region:
        return self._region

    @property
    @override
    def materialized(self) -> bool:
        return not self._values.is_meta

    @property
    @override
    def loaded_dtype(self) -> torch.dtype:
        return self.dtype

    @override
    def values(self) -> Tensor:
        return self._values


class FlatStrategy(Strategy):
    """FSDP1. Its sharded state dict gives the parameters by rows, at full precision, at the cost of one gather of the model, unit by unit.

    Args:
        trained: The model inside ``FullyShardedDataParallel``, or around it.
    """

    def __init__(self, trained: nn.Module) -> None:
        self._trained = trained
        self._groups: list[set[str]] | None = None

    @override
    def parameters(self, module: nn.Module) -> dict[str, Placement]:
        rows = self._rows()
        tied = {name for group in self._ties() for name in sorted(group, key=list(rows).index)[1:] if group <= rows.keys()}
        above = _path(self._trained, module)
        return {name.removeprefix(above): rows[name] for name in rows if name.startswith(above) and name not in tied}

    @override
    def of(self, parameter: Tensor) -> Placement:
        raise LataError(_NO_ADAPTERS)

    @override
    def whole(self, parameter: Tensor) -> Tensor:
        raise LataError(_NO_ADAPTERS)

    @override
    def ties(self, module: nn.Module) -> Iterable[Iterable[str]]:
        above = _path(self._trained, module)
        return [[name.removeprefix(above) for name in group] for group in self._ties() if all(name.startswith(above) for name in group)]

    def _rows(self) -> dict[str, Placement]:
        # On the CPU, as they are a copy of the shards.
        state: dict[str, Any] = get_model_state_dict(self._trained, options=StateDictOptions(full_state_dict=False, cpu_offload=True))
        parameters = {unwrapped(name): parameter for name, parameter in nn.Module.named_parameters(self._trained, remove_duplicate=False)}
        buffers = {unwrapped(name) for name, _ in nn.Module.named_buffers(self._trained, remove_duplicate=False)}
        rows: dict[str, Placement] = {}
        for raw_name, values in state.items():
            name = unwrapped(raw_name)
            if name not in buffers and values.is_floating_point():
                rows[name] = _row_shard(name, values, _asking(name, parameters))
        return rows

    def _ties(self) -> list[set[str]]:
        """Groups of names that are one parameter; found once, as parameters that are packed have to be unpacked for it."""
        if self._groups is None:
            self._groups = []
            for path, unit in self._trained.named_modules():
                if isinstance(unit, FullyShardedDataParallel):
                    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                        self._groups += _same(unwrapped(path), nn.Module.named_parameters(unit, remove_duplicate=False))
        return self._groups


_NO_ADAPTERS = (
    "LATACallback cannot measure adapters under FSDPStrategy, which packs factors and frozen weights into flat tensors; use ModelParallelStrategy "
    "(FSDP2), which keeps them apart"
)


def _row_shard(name: str, values: Any, parameter: Tensor) -> Placement:
    """The placement of an entry of a sharded state dict: a DTensor, a ShardedTensor, or a whole tensor."""
    shape = tuple(values.shape if isinstance(values, Tensor) else values.size())
    if isinstance(values, DTensor):
        return RowShard(values.to_local(), region_of(values), shape, parameter)
    if isinstance(values, Tensor) and type(values) is Tensor:
        return Replicated(values, parameter)
    shards = values.local_shards()
    if not shards:
        nothing = Region(shape, ((0, 0), *((0, length) for length in shape[1:])))
        return RowShard(torch.empty(nothing.size, dtype=values.dtype), nothing, shape, parameter)
    if len(shards) > 1:
        raise LataError(
            f"LATACallback cannot measure {name}, of which FSDP1 gives {len(shards)} shards to one process; use ModelParallelStrategy (FSDP2)"
        )
    metadata = shards[0].metadata
    bounds = tuple((begin, begin + size) for begin, size in zip(metadata.shard_offsets, metadata.shard_sizes, strict=True))
    return RowShard(shards[0].tensor, Region(shape, bounds), shape, parameter)


def _asking(name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """The parameter whose gradient a name of the state dict belongs to: its own, or the flat one of the innermost unit around it."""
    if name in parameters:
        return parameters[name]
    units = {flat.rpartition(".")[0]: parameter for flat, parameter in parameters.items()}
    return units[max((unit for unit in units if not unit or name.startswith(f"{unit}.")), key=len)]


def _same(path: str, named: Iterable[tuple[str, Tensor]]) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in named:
        groups.setdefault(id(parameter), set()).add(f"{path}.{unwrapped(name)}".removeprefix("."))
    return [group for group in groups.values() if len(group) > 1]


def _path(outer: nn.Module, inner: nn.Module) -> str:
    """What the names of a module begin with in another one that contains it; empty, or with a dot at the end."""
    path = next(unwrapped(path) for path, part in outer.named_modules() if part is inner)
    return f"{path}." if path else ""
