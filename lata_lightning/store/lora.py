"""The adapted layers of a peft model, as what they change in the tensors of the checkpoint that is adapted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.merged_layers import KINDS, merged_parameters

# Parts of a name that peft puts between a layer and its own parameters.
_WRAPPERS = ("base_layer", "token_adapter")
# Initialisations that take what the factors start with off the base weight, so that the sum is still the original weight.
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdaptedModel:
    """A model wrapped by peft, under the names of the checkpoint it adapts.

    Plain LoRA is kept as its factors. What any other adapter makes of a weight is computed by peft's own merge, one layer at a time.

    Args:
        model: A ``peft.PeftModel``.

    Attributes:
        module: The model inside, whose layers peft has replaced.
        plain: Parameters by the name the module would give them without peft: trained copies (``modules_to_save``) replace what they copy,
            weights that are quantised are empty (meta tensors) in their full shape.
        quantised: The packed parameter behind each quantised weight, by name in a checkpoint.
        adapted: Names, in a checkpoint, of the tensors that factors are added to.
        merged: Names, in a checkpoint, of the tensors that an adapter changes in another way.
        kinds: What those adapters are, for messages.

    Raises:
        LataError: An adapter changes no weight, cannot be merged, or is merged already.
    """

    def __init__(self, model: Any) -> None:
        configs = {adapter: model.peft_config[adapter].to_dict() for adapter in model.active_adapters}
        for adapter in configs:
            check_kind(adapter, model.peft_config[adapter])
        base = self.module = model.get_base_model()
        found = {unwrapped(name): layer for name, layer in base.named_modules() if _is_tuner(layer)}
        for name, layer in found.items():
            _check_layer(name, layer)
        active = set(configs)
        _check_tied(base, active)
        self.plain: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        parameters = {unwrapped(name): parameter for name, parameter in base.named_parameters()}
        copied = {_plain_name(name, active) for name in parameters if ".modules_to_save." in name}
        own = {id(part) for layer in found.values() for name, part in layer.named_parameters() if not name.startswith("base_layer.")}
        owners = {id(parameter): part for part in base.modules() for parameter in part.parameters(recurse=False)}
        for name, parameter in parameters.items():
            plain = _plain_name(name, active)
            if plain is None or id(parameter) in own or (".original_module." in name and plain in copied):
                continue
            if not is_packed(parameter):
                self.plain[plain] = parameter
                continue
            packed[plain] = parameter
            # A frozen parameter: what is none counts as a buffer, which training can change.
            empty = torch.empty(_full_shape(plain, parameter, owners[id(parameter)]), device="meta")
            self.plain[plain] = nn.Parameter(empty, requires_grad=False)
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        layers: dict[str, list[Any]] = {}
        self._changed: dict[str, list[tuple[Any, str]]] = {}
        self._saved: dict[int, str] = {}
        for layer in found.values():
            for leaf, parameter in _changed_parameters(layer):
                # Tied weights may lie under several layers, and merging adds what each of their adapters adds.
                plain = _plain_name(first_name[id(parameter)], active)
                name = self._saved[id(parameter)] = self._saved_name(str(plain))
                self._changed.setdefault(name, []).append((layer, leaf))
                layers.setdefault(name, []).append(layer)
        self._layers = {name: on for name, on in layers.items() if all(_is_plain_lora(layer) for layer in on)}
        self.quantised: dict[str, Tensor] = {self._saved_name(name): parameter for name, parameter in packed.items()}
        self.adapted = frozenset(self._layers)
        self.merged = frozenset(self._changed) - self.adapted
        self.kinds = tuple(sorted({_kind_of(layer) for name in self.merged for layer in layers[name]}))
        blocked = self.merged & set(self.quantised)
        if blocked:
            raise LataError(
                f"what the adapter makes of {first_three(blocked)} depends on the weights, and these are quantised. Save the adapter with "
                "save_pretrained and extract from its directory, over the full-precision weights: lata extract START ADAPTER --output VECTOR"
            )
        self.residual = all(str(config.get("init_lora_weights")).startswith(RESIDUAL) for config in configs.values())
        """Whether base weight plus what the factors start with is the original weight, by their initialisation."""

    def added(self, name: str) -> LowRank:
        """What the active adapters add to a tensor, in its shape; the factors are those in training, not copies."""
        layers = self._layers[name]
        parts = [_factors(layer, adapter) for layer in layers for adapter in layer.active_adapters if adapter in layer.scaling]
        return LowRank(_weight_shape(layers[0]), tuple(parts))

    def values(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Compute a tensor that an adapter changes otherwise than by adding factors, in float64.

        Args:
            name: One of ``merged``.
            read: Gives the start's tensor of a name.

        Raises:
            LataError: Peft cannot merge a layer of it.
        """
        values = read(name)
        for layer, leaf in self._changed[name]:
            base = dict(layer.get_base_layer().named_parameters(recurse=False))
            held = {other: values if other == leaf else read(self._saved[id(base[other])]) for other, _ in _changed_parameters(layer)}
            values = merged_parameters(layer, held)[leaf]
        return values

    def check_merged(self, read: Callable[[str], Tensor]) -> None:
        """Merge the first layer of every kind, to find out before any work whether peft can.

        Raises:
            LataError: It cannot.
        """
        tried: set[tuple[type, ...]] = set()
        for name in sorted(self.merged):
            kinds = tuple(type(layer) for layer, _ in self._changed[name])
            if kinds not in tried:
                tried.add(kinds)
                self.values(name, read)

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


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter holds quantised values: integers, or a tensor class of its own, as those of torchao."""
    if not parameter.is_floating_point():
        return True
    if type(parameter.data) is Tensor:
        return False
    # Sharded tensors import a compiler's worth of modules, which a command that reads files does not need.
    from torch.distributed.tensor import DTensor

    return type(parameter.data) is not DTensor


def packed_bytes(parameter: Tensor) -> Tensor:
    """The values in which a quantised parameter is kept; of a tensor class of its own, the bytes of all its tensors, flat."""
    data: Any = parameter.detach()
    if type(data.data) is Tensor:
        return parameter.detach()
    # Tensor classes tell by this protocol of torch which tensors they are made of.
    inner, _ = data.__tensor_flatten__()
    parts = [packed_bytes(getattr(data, name)) for name in inner]
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def _full_shape(name: str, parameter: Tensor, owner: Any) -> tuple[int, ...]:
    """Shape of a quantised weight before it was packed."""
    if parameter.is_floating_point():
        return tuple(parameter.shape)
    if not name.endswith("weight") or not hasattr(owner, "out_features"):
        raise LataError(_refusal(f"{name} is quantised in a way that does not tell its shape"))
    return owner.out_features, owner.in_features


def check_kind(adapter: str, config: Any) -> None:
    """Refuse an adapter of a kind that changes no weight, or that is not read.

    Args:
        adapter: Its name.
        config: A ``peft.PeftConfig``.

    Raises:
        LataError: It is of such a kind.
    """
    kind = config.peft_type.value
    if config.is_prompt_learning or kind == "ADAPTION_PROMPT":
        raise LataError(f"the adapter {adapter!r} is of the type {kind}: it changes no weight of the model, so there is no task vector")
    if kind not in KINDS:
        raise LataError(
            f"the adapter {adapter!r} is of the type {kind}, which has not been compared with peft's own merge and is not read. If peft can merge "
            "it, save what merge_and_unload() gives and extract from that: lata extract START MERGED --output VECTOR"
        )
    if config.to_dict().get("layer_replication"):
        raise LataError(f"the adapter {adapter!r} repeats layers (layer_replication): what it makes has other tensors than its start")


def _check_layer(name: str, layer: Any) -> None:
    kind, weight = type(layer).__name__, getattr(layer.get_base_layer(), "weight", None)
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()} if _is_lora(layer) else set()
    what = None
    if kind in ("ParamWrapper", "MultiheadAttention"):
        what = f"adapts a parameter that is no weight of a layer ({kind})"
    elif any(not variant.startswith("Dora") for variant in variants):
        what = f"is a variant of LoRA that depends on its input, or that peft cannot merge ({', '.join(sorted(variants))})"
    elif layer.merged:
        what = "is merged into its base weight; call unmerge_adapter() first"
    elif _is_plain_lora(layer) and getattr(layer.get_base_layer(), "groups", 1) > 1:
        what = "adapts a grouped convolution, which peft cannot merge"
    elif not isinstance(weight, nn.Parameter):
        what = "adapts a weight that is no parameter, but computed from others (as under weight_norm, or quantised by GPTQ or AWQ)"
    elif weight.requires_grad:
        what = "trains the weight under it as well"
    if what is not None:
        raise LataError(_refusal(f"the adapter on {name} {what}"))


def _is_lora(layer: Any) -> bool:
    """Whether a layer is one of LoRA, and not of another kind that is built on it."""
    from peft.tuners import lora

    return isinstance(layer, lora.LoraLayer) and type(layer).__module__.startswith("peft.tuners.lora")


def _is_plain_lora(layer: Any) -> bool:
    """Whether all that a layer does is to add scaling · B @ A to its weight."""
    return _is_lora(layer) and not layer.lora_variant and not any(layer.lora_bias.values())


def _kind_of(layer: Any) -> str:
    """What a layer is called in messages."""
    if _is_lora(layer):
        return "DoRA" if layer.lora_variant else "LoRA with a bias"
    # Each kind of adapter has a package of its own.
    return str(type(layer).__module__.split(".")[2])


def _changed_parameters(layer: Any) -> list[tuple[str, Tensor]]:
    """The parameters of a layer's base layer that merging can change, by their name in it."""
    parameters = list(layer.get_base_layer().named_parameters(recurse=False))
    if not _is_lora(layer):
        return parameters
    return [(leaf, parameter) for leaf, parameter in parameters if leaf == "weight" or any(layer.lora_bias.values())]


def _refusal(what: str) -> str:
    return (
        f"adapters are read by what they change in the weights, and {what}. If peft can merge it, save what merge_and_unload() gives and extract from "
        "that: lata extract START MERGED --output VECTOR"
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
        plain = [".".join(part for part in name.split(".") if part not in (*_WRAPPERS, "original_module")) for name in names]
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
    return ".".join(part for part in parts if part not in _WRAPPERS)
