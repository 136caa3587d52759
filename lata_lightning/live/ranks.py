"""The processes of a run, as far as measuring needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lata_lightning.errors import LataError, first_line

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

    def gathered(self, value: _Result) -> list[_Result]:
        """Return the values that all processes give, by rank, on every one of them; small ones, as they are pickled."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do something on every process, and raise on all of them what failed on any: one that stops alone leaves the others waiting.

        Args:
            work: What to do.

        Raises:
            Exception: What ``work`` raised on this process.
            LataError: What it raised on another process. An error of another kind is named with its process.
        """
        try:
            result = work()
        except Exception as error:
            self._first_report(self._report(error))
            raise
        report = self._first_report(None)
        if report is not None:
            raise report
        return result

    def _report(self, error: Exception) -> LataError:
        """An error as the other processes raise it; errors of other kinds need not survive the way to them."""
        if isinstance(error, LataError):
            return error
        return LataError(
            f"process {self.rank} of {self.world} failed with {type(error).__name__}: {first_line(error)}. Its own log holds the traceback."
        )

    def _first_report(self, report: LataError | None) -> LataError | None:
        """Exchange the reports of all processes; the one of the lowest rank, or None."""
        return next((one for one in self.gathered(report) if one is not None), None)
