"""The processes of a run, as far as measuring needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lata_lightning.errors import LataError

_Result = TypeVar("_Result")


class Ranks:
    """All processes of the default process group; one process alone where there is none.

    Attributes:
        rank: Number of this process.
        world: How many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        # NCCL moves tensors between GPUs only.
        on_device = together and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, on every one of them; on the CPU."""
        if self.world == 1:
            return tensor.cpu()
        summed = tensor.to(self._device, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()

    def from_rank(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one process, on every one of them; all give one of its shape and dtype. On the CPU."""
        if self.world == 1:
            return tensor.cpu()
        sent = tensor.to(self._device).contiguous()
        dist.broadcast(sent, source)
        return sent.cpu()

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do something on every process, and raise on all of them what failed on any: one that stops alone leaves the others waiting."""
        result, error = _attempt(work)
        if self.world > 1:
            errors: list[LataError | None] = [None] * self.world
            dist.all_gather_object(errors, error)
            error = next((other for other in errors if other is not None), None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # without an error there is a result


def _attempt(work: Callable[[], _Result]) -> tuple[_Result | None, LataError | None]:
    try:
        return work(), None
    except LataError as error:
        return None, error
