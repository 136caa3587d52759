"""The model in training as it now stands; one wrapped by peft as the model it stands for, base weights plus what its LoRA layers add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lata_lightning.callbacks.live_model import COMPILED, LiveModel, find_model, peft_kinds
from lata_lightning.errors import LataError
from lata_lightning.store.checkpoint_names import under_checkpoint_names


class LoraModel(LiveModel):
    """A LoRA model in training, under the names of the checkpoint it adapts.

    What an adapter adds to a tensor is computed by peft when it is asked for, so it is exact for every rank, scaling and layer that peft knows;
    the base weights themselves are frozen and are their own start. Trained copies (``modules_to_save``) stand in the place of what they copy.

    Args:
        model: A ``peft.PeftModel``.

    Raises:
        LataError: An adapter is no plain LoRA, is merged, or does not start at zero.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        layers = {name.replace(COMPILED, ""): module for name, module in base.named_modules() if _is_tuner(module)}
        for name, layer in layers.items():
            _check_layer(name, layer)
        adapters = set(model.active_adapters)
        found: dict[str, Tensor] = {}
        for name, parameter in base.named_parameters():
            plain = _plain_name(name.replace(COMPILED, ""), adapters)
            if plain is not None and parameter.is_floating_point():
                found[plain] = parameter
        if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
            raise LataError("LATACallback cannot measure adapters of a sharded model; use one device or strategy='ddp'")
        self._take(base, found)
        self._layers: dict[str, Any] = {}
        for name, layer in layers.items():
            saved = list(under_checkpoint_names(base, {f"{name}.weight": found[f"{name}.weight"]}))
            if len(saved) != 1:
                raise LataError(f"the adapter on {name} cannot be measured: a checkpoint stores its weight in {len(saved)} pieces")
            self._layers[saved[0]] = layer

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter adds to."""
        return frozenset(self._layers)

    def added(self, name: str) -> Tensor:
        """What the active adapters add to a tensor, in its shape."""
        layer = self._layers[name]
        with torch.no_grad():
            parts = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.scaling]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    @property
    def changing(self) -> tuple[str, ...]:
        """Names of the tensors that training can change now: by an adapter, as a trained copy, or themselves."""
        by_themselves = set(super().changing)
        by_adapter = {name for name, layer in self._layers.items() if any(parameter.requires_grad for parameter in layer.parameters())}
        return tuple(name for name in self.names if name in by_adapter or name in by_themselves)


def look_at(root: nn.Module, name: str | None = None) -> LiveModel:
    """The model inside a LightningModule as it now stands (see ``find_model``)."""
    for part in root.modules():
        # After a forward pass without gradients the parameters of the outermost group stay gathered, as plain tensors.
        if isinstance(part, FSDPModule):
            part.reshard()
    module = find_model(root, name)
    return LoraModel(module) if isinstance(module, peft_kinds()) else LiveModel(module)


def _is_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _check_layer(name: str, layer: Any) -> None:
    from peft.tuners import lora

    plain = (lora.Linear, lora.Embedding, lora.Conv2d, lora.Conv3d)
    variants = getattr(layer, "lora_variant", {})
    what = None
    if not isinstance(layer, plain):
        what = f"is a {type(layer).__module__.split('.')[2]} adapter ({type(layer).__name__})"
    elif variants or any(getattr(layer, "lora_bias", {}).values()):
        what = "is a variant of LoRA (DoRA, or one with a bias)"
    elif layer.merged:
        what = "is merged into its base weight; call unmerge_adapter() first"
    elif not layer.get_base_layer().weight.is_floating_point():
        what = "stands on a quantised weight"
    if what is not None:
        raise LataError(
            f"LATACallback measures plain LoRA on floating weights, and the adapter on {name} {what}. Extract the task vector after training instead: "
            "save what merge_and_unload() gives and run lata extract."
        )


def _plain_name(name: str, adapters: set[str]) -> str | None:
    """Name of a parameter in the checkpoint that is adapted; None for factors of an adapter and for originals that a trained copy replaces."""
    if ".lora_" in name or ".original_module." in name:
        return None
    parts = name.split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        return ".".join(parts[:place] + parts[place + 2 :]) if parts[place + 1] in adapters else None
    return ".".join(part for part in parts if part != "base_layer")
