"""The LoRA layers of a peft model, as what they add to the tensors of the checkpoint that is adapted."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.store.checkpoint_names import under_checkpoint_names

# Initialisations that take what the factors start with off the base weight, so that the sum is still the original weight.
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdaptedModel:
    """A model wrapped by peft with LoRA, under the names of the checkpoint it adapts.

    Args:
        model: A ``peft.PeftModel``.

    Attributes:
        module: The model inside, whose layers peft has replaced.
        plain: Parameters by the name the module would give them without peft: trained copies (``modules_to_save``) stand in the place of what
            they copy, weights that are quantised are empty (meta tensors) in their full shape.
        quantised: The packed parameter behind each quantised weight, by name in a checkpoint.
        adapted: Names, in a checkpoint, of the tensors that an adapter adds to.

    Raises:
        LataError: An adapter is no plain LoRA, or is merged.
    """

    def __init__(self, model: Any) -> None:
        for adapter in model.active_adapters:
            kind = str(getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type))
            if kind != "LORA":
                raise LataError(_refusal(f"the adapter {adapter!r} is of the type {kind}"))
            if getattr(model.peft_config[adapter], "layer_replication", None):
                raise LataError(
                    f"the adapter {adapter!r} repeats layers (layer_replication): what it makes has other tensors than its start"
                )
        base = self.module = model.get_base_model()
        found = {unwrapped(name): layer for name, layer in base.named_modules() if _is_tuner(layer)}
        for name, layer in found.items():
            _check_layer(name, layer)
        active = set(model.active_adapters)
        _check_tied(base, active)
        self.plain: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        parameters = {unwrapped(name): parameter for name, parameter in base.named_parameters()}
        copied = {_plain_name(name, active) for name in parameters if ".modules_to_save." in name}
        owners = {id(parameter): part for part in base.modules() for parameter in part.parameters(recurse=False)}
        for name, parameter in parameters.items():
            plain = _plain_name(name, active)
            if plain is None or (".original_module." in name and plain in copied):
                continue
            if parameter.is_floating_point():
                self.plain[plain] = parameter
                continue
            owner = owners[id(parameter)]
            if not plain.endswith("weight") or not hasattr(owner, "out_features"):
                raise LataError(_refusal(f"{plain} is quantised in a way that does not tell its shape"))
            packed[plain] = parameter
            # A frozen parameter: what is none counts as a buffer, which training can change.
            empty = torch.empty(owner.out_features, owner.in_features, device="meta")
            self.plain[plain] = nn.Parameter(empty, requires_grad=False)
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        self._layers: dict[str, list[Any]] = {}
        self.quantised: dict[str, Tensor] = {}
        for layer in found.values():
            # Tied weights may stand under several layers, and merging adds what each of their adapters adds.
            name = first_name[id(layer.get_base_layer().weight)]
            self._layers.setdefault(self._saved_name(name.replace(".base_layer.", ".")), []).append(layer)
        for name, parameter in packed.items():
            self.quantised[self._saved_name(name)] = parameter
        self.adapted = frozenset(self._layers)
        self.residual = all(str(model.peft_config[adapter].init_lora_weights).startswith(RESIDUAL) for adapter in active)
        """Whether base weight plus what the factors start with is the original weight, by their initialisation."""

    def added(self, name: str) -> LowRank:
        """What the active adapters add to a tensor, in its shape; the factors are those in training, not copies."""
        layers = self._layers[name]
        parts = [_factors(layer, adapter) for layer in layers for adapter in layer.active_adapters if adapter in layer.scaling]
        return LowRank(_weight_shape(layers[0]), tuple(parts))

    def trains(self, name: str) -> bool:
        """Whether a factor of a tensor's adapter asks for gradients."""
        return any(parameter.requires_grad for layer in self._layers[name] for parameter in layer.parameters())

    def _saved_name(self, name: str) -> str:
        saved = list(under_checkpoint_names(self.module, {name: self.plain[name]}))
        if len(saved) != 1:
            raise LataError(_refusal(f"a checkpoint stores the adapted weight {name} in {len(saved)} pieces"))
        return saved[0]


def peft_kinds() -> tuple[Any, ...]:
    """The class of models wrapped by peft; none as long as peft is not imported."""
    # What was never imported cannot have been used to build the module.
    peft = sys.modules.get("peft")
    return (peft.PeftModel,) if peft is not None else ()


def check_unwrapped(module: nn.Module) -> None:
    """Refuse a model with adapter layers that no ``peft.PeftModel`` is around: their weights would pass for those of the model.

    Raises:
        LataError: It holds such layers.
    """
    if "peft" not in sys.modules:
        return
    layers = [name for name, part in module.named_modules() if _is_tuner(part)]
    if layers:
        raise LataError(
            f"adapters must be put on a model by peft.get_peft_model or PeftModel.from_pretrained, which note how they are to be read; there are adapters "
            f"without it on {first_three(layers)} (as by add_adapter or inject_adapter_in_model, or in a PeftMixedModel). Wrap the model itself."
        )


def _is_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _check_layer(name: str, layer: Any) -> None:
    from peft.tuners import lora

    kind = type(layer)
    what = None
    if not kind.__module__.startswith("peft.tuners.lora") or not isinstance(layer, lora.LoraLayer):
        what = f"is a {kind.__module__.split('.')[2]} adapter ({kind.__name__})"
    elif kind.__name__ in ("ParamWrapper", "MultiheadAttention"):
        what = f"adapts a parameter that is no weight of a layer ({kind.__name__})"
    elif getattr(layer, "lora_variant", {}) or any(getattr(layer, "lora_bias", {}).values()):
        what = "is a variant of LoRA (DoRA, or one with a bias)"
    elif layer.merged:
        what = "is merged into its base weight; call unmerge_adapter() first"
    elif getattr(layer.get_base_layer(), "groups", 1) > 1:
        what = "adapts a grouped convolution, which peft cannot merge"
    elif not isinstance(getattr(layer.get_base_layer(), "weight", None), nn.Parameter):
        what = "adapts a weight that is no parameter, but computed from others (as under weight_norm, or quantised by GPTQ or AWQ)"
    elif layer.get_base_layer().weight.requires_grad:
        what = "trains the weight under it as well"
    if what is not None:
        raise LataError(_refusal(f"the adapter on {name} {what}"))


def _refusal(what: str) -> str:
    return (
        f"LoRA is measured in its factors, and {what}. Where peft can merge it, save what merge_and_unload() gives and take the vector from that: "
        "lata extract START MERGED --output VECTOR"
    )


def _weight_shape(layer: Any) -> tuple[int, ...]:
    weight = layer.get_base_layer().weight
    return tuple(weight.shape) if weight.is_floating_point() else (layer.out_features, layer.in_features)


def _factors(layer: Any, adapter: str) -> Factors:
    scale = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        # peft multiplies B @ A and turns the product over.
        return Factors(layer.lora_embedding_A[adapter].detach().T, layer.lora_embedding_B[adapter].detach().T, scale)
    first, second = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    # Of a convolution the second factor has a kernel of one entry.
    first, second = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
    return Factors(first.T, second.T, scale) if getattr(layer, "fan_in_fan_out", False) else Factors(second, first, scale)


def _check_tied(base: nn.Module, active: set[str]) -> None:
    """Refuse trained copies of a tied weight that leave its other places with the original: no checkpoint of the start's layout holds both."""
    places: dict[int, list[str]] = {}
    parameters = {unwrapped(name): parameter for name, parameter in base.named_parameters(remove_duplicate=False)}
    for name, parameter in parameters.items():
        places.setdefault(id(parameter), []).append(name)
    copies = {_plain_name(name, active): id(parameter) for name, parameter in parameters.items() if ".modules_to_save." in name}
    for number, names in places.items():
        plain = [name.replace(".original_module.", ".").replace(".base_layer.", ".") for name in names]
        if len({copies.get(name, number) for name in plain}) > 1:
            raise LataError(
                f"a trained copy of a tied weight must stand in all its places, and there is one in some only of {first_three(plain)}. Pass "
                "ensure_weight_tying=True to LoraConfig."
            )


def _plain_name(name: str, adapters: set[str]) -> str | None:
    """Name of a parameter in the module without peft; None for factors of an adapter, and for copies that are not in use."""
    if ".lora_" in name:
        return None
    parts = name.replace(".original_module.", ".").split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        return ".".join(parts[:place] + parts[place + 2 :]) if parts[place + 1] in adapters else None
    return ".".join(part for part in parts if part != "base_layer")
