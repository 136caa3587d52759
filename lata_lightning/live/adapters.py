"""The model in training as it is now; one with LoRA as the model it represents: base weights, plus what the LoRA layers add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.litgpt import LitgptLoraModel, lora_layers
from lata_lightning.live.live_model import LiveModel, find_model
from lata_lightning.live.placements.mesh import MeshStrategy
from lata_lightning.live.placements.placement import Strategy
from lata_lightning.live.placements.strategies import strategy_of
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.store.foreign_adapters import check_no_factors
from lata_lightning.store.lora import AdaptedModel, check_unwrapped, packed_bytes, peft_kinds
from lata_lightning.store.names import NOTHING, LeaveOut


class LoraModel(LiveModel):
    """A LoRA model in training, under the names of the checkpoint it adapts.

    What an adapter adds to a tensor is given as its factors; the base weights themselves are frozen. Trained copies (``modules_to_save``)
    replace what they copy. Where a strategy spreads the factors over processes, they are gathered when the model is looked at; base weights
    never are.

    Args:
        model: A ``peft.PeftModel``.
        leave_out: Tells of a name whether its tensor is left out.
        strategy: How the parameters are spread over the processes. Every process has to make one at the same time.

    Raises:
        LataError: An adapter is no plain LoRA, or is merged; or the quantised weights under it are sharded.
    """

    def __init__(self, model: Any, leave_out: LeaveOut = NOTHING, strategy: Strategy | None = None) -> None:
        strategy = strategy or MeshStrategy()
        self._adapters = AdaptedModel(model, strategy.whole, lambda parameter: strategy.of(parameter).shape)
        if self._adapters.merged:
            raise LataError(
                f"LATACallback measures LoRA in its factors, and {', '.join(self._adapters.kinds)} change {first_three(self._adapters.merged)} in "
                "another way. Train without the callback, save the adapter, and take the vector from that: lata extract START ADAPTER --output VECTOR"
            )
        placements = {name: strategy.of(parameter) for name, parameter in self._adapters.plain.items()}
        self._take(self._adapters.module, placements, leave_out, strategy)
        # What the factors start with may be taken off the base weights.
        self.residual = self._adapters.residual
        spread = any(not strategy.of(parameter).replicated for parameter in model.parameters())
        self._gathered = {name: self._adapters.added(name) for name in sorted(self._adapters.adapted)} if spread else {}
        wrong = [name for name, added in self._gathered.items() if any(not _fits(part, added) for part in added.parts)]
        if wrong or (spread and self._adapters.quantised):
            raise LataError(
                f"LATACallback measures LoRA on sharded weights in full or half precision, and quantised ones are under the adapters of "
                f"{first_three(wrong or sorted(self._adapters.quantised))}. Train without the callback, save the adapter, and take the vector from that: "
                "lata extract START ADAPTER --output VECTOR"
            )

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter adds to."""
        return self._adapters.adapted & self._placements.keys()

    def added(self, name: str) -> LowRank:
        """Return what the active adapters add to a tensor, as their factors; of gathered ones, as they were when the model was looked at."""
        return self._gathered.get(name) or self._adapters.added(name)

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


def look_at(root: nn.Module, name: str | None = None, leave_out: LeaveOut = NOTHING, strategy: Strategy | None = None) -> LiveModel:
    """Return the model inside a LightningModule as it is now (see ``find_model``), without the tensors that are left out.

    Args:
        root: The LightningModule, or any other module.
        name: Path of the model inside of it; None to look for it.
        leave_out: Tells of a name whether its tensor is left out.
        strategy: How the parameters are spread over the processes; None if that shows in the root. Where they are, every process has to look at the
            same time.
    """
    for part in root.modules():
        # After a forward pass without gradients the parameters of the outermost group stay gathered, as plain tensors.
        if isinstance(part, FSDPModule):
            part.reshard()
    strategy = strategy or strategy_of(root)
    module = find_model(root, name)
    if isinstance(module, peft_kinds()):
        return LoraModel(module, leave_out, strategy)
    if lora_layers(module):
        return LitgptLoraModel(module, leave_out, strategy)
    check_unwrapped(module)
    check_no_factors((unwrapped(parameter) for parameter, _ in nn.Module.named_parameters(module)), "the model in training")
    return LiveModel(module, leave_out, strategy)


def _fits(part: Factors, added: LowRank) -> bool:
    return part.left.shape[0] == added.shape[0] and part.right.shape[1] == added.columns
