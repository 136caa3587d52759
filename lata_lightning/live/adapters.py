"""The model in training as it is now; one with LoRA as the model it represents: base weights, plus what the LoRA layers add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.litgpt import LitgptLoraModel, lora_layers
from lata_lightning.live.live_model import LiveModel, find_model
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.foreign_adapters import check_no_factors
from lata_lightning.store.lora import AdaptedModel, check_unwrapped, packed_bytes, peft_kinds
from lata_lightning.store.names import NOTHING, LeaveOut


class LoraModel(LiveModel):
    """A LoRA model in training, under the names of the checkpoint it adapts.

    What an adapter adds to a tensor is given as its factors; the base weights themselves are frozen. Trained copies (``modules_to_save``) replace
    what they copy.

    Args:
        model: A ``peft.PeftModel``.
        leave_out: Tells of a name whether its tensor is left out.

    Raises:
        LataError: An adapter is no plain LoRA, is merged, or the model is sharded.
    """

    def __init__(self, model: Any, leave_out: LeaveOut = NOTHING) -> None:
        self._adapters = AdaptedModel(model)
        if self._adapters.merged:
            raise LataError(
                f"LATACallback measures LoRA in its factors, and {', '.join(self._adapters.kinds)} change {first_three(self._adapters.merged)} in "
                "another way. Train without the callback, save the adapter, and take the vector from that: lata extract START ADAPTER --output VECTOR"
            )
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise LataError("LATACallback cannot measure adapters of a sharded model; use one device or strategy='ddp'")
        self._take(self._adapters.module, self._adapters.plain, leave_out)
        # What the factors start with may be taken off the base weights.
        self.residual = self._adapters.residual

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter adds to."""
        return self._adapters.adapted & self._tensors.keys()

    def added(self, name: str) -> LowRank:
        """Return what the active adapters add to a tensor, as their factors."""
        return self._adapters.added(name)

    @property
    def quantised(self) -> frozenset[str]:
        """Names of the tensors whose values are packed away; only what adapters add to them can be measured."""
        return frozenset(self._adapters.quantised)

    def bits(self, name: str) -> Tensor:
        """Return the local values of a tensor as they are stored, packed ones as they are packed."""
        packed = self._adapters.quantised.get(name)
        return super().bits(name) if packed is None else packed_bytes(packed)

    @property
    def changing(self) -> tuple[str, ...]:
        """Names of the tensors that training can change now: by an adapter, as a trained copy, or themselves."""
        by_themselves = set(super().changing)
        by_adapter = {name for name in self.adapted if self._adapters.trains(name)}
        return tuple(name for name in self.names if name in by_adapter or name in by_themselves)


def look_at(root: nn.Module, name: str | None = None, leave_out: LeaveOut = NOTHING) -> LiveModel:
    """Return the model inside a LightningModule as it is now (see ``find_model``), without the tensors that are left out."""
    for part in root.modules():
        # After a forward pass without gradients the parameters of the outermost group stay gathered, as plain tensors.
        if isinstance(part, FSDPModule):
            part.reshard()
    module = find_model(root, name)
    if isinstance(module, peft_kinds()):
        return LoraModel(module, leave_out)
    if lora_layers(module):
        return LitgptLoraModel(module, leave_out)
    check_unwrapped(module)
    check_no_factors((unwrapped(parameter) for parameter, _ in nn.Module.named_parameters(module)), "the model in training")
    return LiveModel(module, leave_out)
