"""Parameters that DeepSpeed partitions: ZeRO-1 and 2, whose float32 masters are spread over the processes, and ZeRO-3.

DeepSpeed notes on a parameter where its parts are. What is measured is the float32 master that the optimizer updates, never the parameter that is rounded
from it for the forward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.placements.placement import PerParameter, Placement, Sharded
from lata_lightning.live.placements.region import Region
from lata_lightning.live.placements.replicated import Replicated

# Attributes that DeepSpeed gives to parameters: the part of the master on this process (ZeRO-1 and 2), and the number of a partitioned parameter (ZeRO-3).
_MASTER, _PARTITIONED = "_hp_mapping", "ds_id"


class Master(Sharded):
    """The part of a float32 master under ZeRO-1 or 2.

    Args:
        parameter: The parameter, which every process has, in the precision of the forward pass.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(tuple(parameter.shape), torch.float32, parameter)
        self._parameter: Any = parameter

    @property
    @override
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    @override
    def region(self) -> Region:
        part = self._parameter._hp_mapping
        if part is None:
            return Region.flat(self._parameter.numel(), 0, 0)
        fragment = part.lp_fragment_address
        return Region.flat(self._parameter.numel(), fragment.start, fragment.start + fragment.numel)

    @property
    @override
    def materialized(self) -> bool:
        return True

    @property
    @override
    def loaded_dtype(self) -> torch.dtype:
        lower: torch.dtype = self._parameter.dtype
        return lower

    @override
    def values(self) -> Tensor:
        part = self._parameter._hp_mapping
        return torch.empty(0) if part is None else part.get_hp_fragment().detach().reshape(-1).float()


class Partition(Sharded):
    """The range of a parameter that lies on this process under ZeRO-3.

    Args:
        parameter: The parameter, empty between uses.
    """

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        super().__init__(tuple(self._parameter.ds_shape), self.dtype, parameter)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return torch.float32 if self._has_master else self.loaded_dtype

    @property
    @override
    def region(self) -> Region:
        count, length = self._parameter.ds_numel, self._parameter.ds_tensor.ds_numel
        begin = dist.get_rank(self._parameter.ds_process_group) * length
        # The last parts are filled up to the length of the others.
        return Region.flat(count, min(begin, count), min(begin + length, count))

    @property
    @override
    def materialized(self) -> bool:
        return True

    @property
    @override
    def loaded_dtype(self) -> torch.dtype:
        lower: torch.dtype = self._parameter.ds_tensor.dtype
        return lower

    @override
    def values(self) -> Tensor:
        part: Tensor = self._master() if self._has_master else self._parameter.ds_tensor.data
        return part.detach().reshape(-1)[: self.region.entries].to(self.dtype)

    @property
    def _has_master(self) -> bool:
        optimizer = vars(self._parameter).get("_z3_optimizer")
        return optimizer is not None and optimizer.get_param_id(self._parameter) in optimizer.grad_position

    def _master(self) -> Any:
        from deepspeed.utils import safe_get_local_fp32_param

        # Of a parameter that is frozen by now the function gives nothing, though the optimizer still has its master.
        asks = self._parameter.requires_grad
        self._parameter.requires_grad = True
        try:
            return safe_get_local_fp32_param(self._parameter)
        finally:
            self._parameter.requires_grad = asks


class ZeroStrategy(PerParameter):
    """DeepSpeed ZeRO-1, 2 and 3."""

    @override
    def of(self, parameter: Tensor) -> Placement:
        if _PARTITIONED in vars(parameter):
            return Partition(parameter)
        return Master(parameter) if _MASTER in vars(parameter) else Replicated(parameter)

    @override
    def whole(self, parameter: Tensor) -> Tensor:
        import deepspeed

        known: Any = parameter
        if self.of(parameter).dtype == torch.float32 and parameter.requires_grad and not self.of(parameter).replicated:
            master: Tensor = deepspeed.utils.safe_get_full_fp32_param(known)
            return master.detach()
        with deepspeed.zero.GatheredParameters([known]):
            return parameter.detach().clone()


def uses_deepspeed(trained: nn.Module) -> bool:
    """Return whether DeepSpeed partitions a model, or the optimizer states of it."""
    # What was never imported cannot have been used.
    if "deepspeed" not in sys.modules:
        return False
    return any(_PARTITIONED in vars(parameter) or _MASTER in vars(parameter) for parameter in nn.Module.parameters(trained))


def check_masters(trained: nn.Module) -> None:
    """Refuse a DeepSpeed engine whose parameters are rounded from masters that it does not show, or are on disk.

    Raises:
        LataError: There are trained parameters in half precision without a master, or parameters that are offloaded to disk.
    """
    deepspeed: Any = sys.modules.get("deepspeed")
    engines: list[Any] = [] if deepspeed is None else [part for part in trained.modules() if isinstance(part, deepspeed.DeepSpeedEngine)]
    for engine in engines:
        named = [(unwrapped(name), parameter) for name, parameter in nn.Module.named_parameters(engine.module)]
        hidden = [
            name
            for name, parameter in named
            if parameter.requires_grad
            and parameter.dtype in (torch.float16, torch.bfloat16)
            and not {_PARTITIONED, _MASTER} & vars(parameter).keys()
        ]
        if hidden and (engine.fp16_enabled() or engine.bfloat16_enabled()):
            raise LataError(
                f"DeepSpeed trains float32 masters of {first_three(hidden)} that it does not show, so only rounded values could be measured. Use ZeRO "
                "stage 1, 2 or 3, and freeze parameters that no optimizer trains (requires_grad_(False))."
            )
        away = [name for name, parameter in named if _PARTITIONED in vars(parameter) and _on_disk(parameter)]
        if away:
            raise LataError(
                f"DeepSpeed has offloaded parameters to disk, where they cannot be measured: {first_three(away)}. Offload them to the CPU instead "
                "(offload_params_device='cpu')."
            )


def _on_disk(parameter: Any) -> bool:
    return bool(parameter.ds_tensor.numel() == 0 and parameter.ds_numel > 0)
