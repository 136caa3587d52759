"""LoRA of LitGPT: layers of its own, whose base weight lies in a linear layer inside of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.placements.mesh import MeshStrategy
from lata_lightning.live.placements.placement import Strategy
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.store.names import NOTHING, LeaveOut


class LitgptLoraModel(LiveModel):
    """A GPT of LitGPT with LoRA, under the names of the checkpoint it was loaded from.

    What an adapter adds to a weight is given as its factors; of fused queries, keys and values, as one product for each that has an adapter.

    Args:
        module: A ``litgpt.lora.GPT``.
        leave_out: Tells of a name whether its tensor is left out.
        strategy: How the parameters are spread over the processes. Every process has to make one at the same time.

    Raises:
        LataError: Adapters are merged into their weights.
    """

    def __init__(self, module: nn.Module, leave_out: LeaveOut = NOTHING, strategy: Strategy | None = None) -> None:
        self._spread = strategy or MeshStrategy()
        self._layers = {f"{path}.weight": layer for path, layer in lora_layers(module).items()}
        merged = [name for name, layer in self._layers.items() if layer.merged]
        if merged:
            raise LataError(
                f"LATACallback measures LoRA in its factors, and LitGPT has merged them into {first_three(merged)}. Train before merge_lora_weights is "
                "called."
            )
        super().__init__(module, leave_out, self._spread, _plain_names(module))
        spread = any(not self._spread.of(parameter).replicated for parameter in module.parameters())
        self._gathered = {name: self._factors(name) for name in sorted(self._layers)} if spread else {}

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter adds to."""
        return frozenset(self._layers.keys() & self._placements.keys())

    def added(self, name: str) -> LowRank:
        """Return what an adapter adds to a tensor, as its factors."""
        return self._gathered.get(name) or self._factors(name)

    def _factors(self, name: str) -> LowRank:
        layer = self._layers[name]
        shape = self._spread.of(layer.linear.weight).shape
        second, first_factor = self._spread.whole(layer.lora_B), self._spread.whole(layer.lora_A)
        if not isinstance(layer, _fused_kinds()):
            return LowRank(shape, (Factors(second, first_factor, layer.scaling),))
        lengths = layer.qkv_shapes
        # LitGPT says where a row of the factors goes by padding: here it pads the numbers of the rows, from 1.
        numbers = layer.zero_pad(torch.arange(1, sum(lengths) + 1, dtype=torch.float64, device=second.device)).long()
        parts, first = [], 0
        for length, right in zip(lengths, first_factor.chunk(len(lengths)), strict=True):
            rows = (numbers > first) & (numbers <= first + length)
            left = second.new_zeros(shape[0], second.shape[1])
            left[rows] = second[numbers[rows] - 1]
            parts.append(Factors(left, right, layer.scaling))
            first += length
        return LowRank(shape, tuple(parts))

    @property
    def changing(self) -> tuple[str, ...]:
        """Names of the tensors that training can change now: by an adapter, or themselves."""
        by_themselves = set(super().changing)
        by_adapter = {name for name in self.adapted if self._layers[name].lora_A.requires_grad or self._layers[name].lora_B.requires_grad}
        return tuple(name for name in self.names if name in by_adapter or name in by_themselves)


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Return the layers of a module that have LoRA of LitGPT, by their path without what wrappers add to it."""
    lora = sys.modules.get("litgpt.lora")
    if lora is None:
        return {}
    layers = ((unwrapped(path), part) for path, part in module.named_modules() if isinstance(part, lora.LoRALinear))
    # Layers of rank 0 are there, too, and have no factors.
    return {path: layer for path, layer in layers if "lora_A" in dict(layer.named_parameters(recurse=False))}


def _fused_kinds() -> tuple[Any, ...]:
    return (sys.modules["litgpt.lora"].LoRAQKVLinear,)


def _plain_names(module: nn.Module) -> Callable[[str], str | None]:
    """Return the function from a name in a module to the name in a checkpoint of the same model without LoRA; None for a factor."""
    lora = sys.modules["litgpt.lora"]
    paths = {unwrapped(path) for path, part in module.named_modules() if isinstance(part, lora.LoRALayer)}

    def plain_name(name: str) -> str | None:
        path, _, leaf = name.rpartition(".")
        if path in paths:
            return None
        inside = path.endswith(".linear") and path.removesuffix(".linear") in paths
        return f"{path.removesuffix('.linear')}.{leaf}" if inside else name

    return plain_name
