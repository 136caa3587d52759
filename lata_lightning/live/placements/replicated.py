"""Tensors that every process has whole: one device, DDP, and buffers under any strategy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.live.placements.placement import Placement
from lata_lightning.live.placements.region import Region


class Replicated(Placement):
    """A plain tensor, of which every process has the same copy.

    Args:
        tensor: A parameter, a buffer, or a piece of one.
        trains: The tensor whose ``requires_grad`` says whether training changes this one; by default the tensor itself.
    """

    def __init__(self, tensor: Tensor, trains: Tensor | None = None) -> None:
        self._tensor, self._trains = tensor, tensor if trains is None else trains

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
        return Region.whole(self.shape)

    @property
    @override
    def replicated(self) -> bool:
        return True

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
        return self._tensor

    @property
    @override
    def loaded_dtype(self) -> torch.dtype:
        return self.dtype

    @override
    def values(self) -> Tensor:
        return self._tensor.detach()
