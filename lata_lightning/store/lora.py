"""What the adapters of a peft model change in the tensors of the checkpoint that they adapt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.adapter_layers import (
    changed_parameters,
    check_kind,
    check_layer,
    factors_of,
    is_plain_lora,
    is_tuner,
    kind_of,
    refusal,
    shape_of,
    weight_shape,
)
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.merged_layers import merged_parameters

# Parts of a name that peft puts between a layer and its own parameters.
_WRAPPERS = ("base_layer", "token_adapter")
# Initialisations that subtract the first product of the factors from the base weight, so that the sum is still the original weight.
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdaptedModel:
    """A model wrapped by peft, under the names of the checkpoint it adapts.

    Plain LoRA stays factors. The weights of any other adapter are computed by peft's own merge, one layer at a time.

    Args:
        model: A ``peft.PeftModel``.
        whole: Gives all values of a factor, where a strategy has spread them over processes. It is called for every factor in one order.
        shape: Gives the whole shape of a parameter, likewise.

    Attributes:
        module: The model inside, whose layers peft has replaced.
        plain: Parameters by the name they would have without peft: trained copies (``modules_to_save``) replace the original, and quantised
            weights are meta tensors in their full shape.
        quantised: The packed parameter behind each quantised weight, by name in a checkpoint.
        adapted: Names, in a checkpoint, of the tensors that factors are added to.
        merged: Names, in a checkpoint, of the tensors that an adapter changes in any other way.
        kinds: Kinds of those adapters, for messages.

    Raises:
        LataError: An adapter changes no weight, cannot be merged, or is merged already.
    """

    def __init__(
        self, model: Any, whole: Callable[[Tensor], Tensor] = Tensor.detach, shape: Callable[[Tensor], tuple[int, ...]] = shape_of
    ) -> None:
        self._whole, self._shape = whole, shape
        configs = {adapter: model.peft_config[adapter].to_dict() for adapter in model.active_adapters}
        for adapter in configs:
            check_kind(adapter, model.peft_config[adapter])
        base = self.module = model.get_base_model()
        adapted_layers = {unwrapped(name): layer for name, layer in base.named_modules() if is_tuner(layer)}
        for name, layer in adapted_layers.items():
            check_layer(name, layer)
        active = set(configs)
        _check_tied(base, active)
        self.plain: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        parameters = {unwrapped(name): parameter for name, parameter in base.named_parameters()}
        copied = {_plain_name(name, active) for name in parameters if ".modules_to_save." in name}
        own = {
            id(part) for layer in adapted_layers.values() for name, part in layer.named_parameters() if not name.startswith("base_layer.")
        }
        owners = {id(parameter): part for part in base.modules() for parameter in part.parameters(recurse=False)}
        for name, parameter in parameters.items():
            plain = _plain_name(name, active)
            if plain is None or id(parameter) in own or (".original_module." in name and plain in copied):
                continue
            if not is_packed(parameter):
                self.plain[plain] = parameter
                continue
            packed[plain] = parameter
            # A frozen parameter, as any other tensor would count as a buffer, which training can change.
            empty = torch.empty(_full_shape(plain, parameter, owners[id(parameter)]), device="meta")
            self.plain[plain] = nn.Parameter(empty, requires_grad=False)
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        layers: dict[str, list[Any]] = {}
        self._changed: dict[str, list[tuple[Any, str]]] = {}
        self._saved: dict[int, str] = {}
        for layer in adapted_layers.values():
            for leaf, parameter in changed_parameters(layer):
                # Tied weights may belong to several layers; merging adds what the adapters of each add.
                plain = _plain_name(first_name[id(parameter)], active)
                name = self._saved[id(parameter)] = self._saved_name(str(plain))
                self._changed.setdefault(name, []).append((layer, leaf))
                layers.setdefault(name, []).append(layer)
        self._layers = {name: on for name, on in layers.items() if all(is_plain_lora(layer) for layer in on)}
        self.quantised: dict[str, Tensor] = {self._saved_name(name): parameter for name, parameter in packed.items()}
        self.adapted = frozenset(self._layers)
        self.merged = frozenset(self._changed) - self.adapted
        self.kinds = tuple(sorted({kind_of(layer) for name in self.merged for layer in layers[name]}))
        blocked = self.merged & set(self.quantised)
        if blocked:
            raise LataError(
                f"what the adapter makes of {first_three(blocked)} depends on the weights, and these are quantised. Save the adapter with "
                "save_pretrained and extract from its directory, over the full-precision weights: lata extract START ADAPTER --output VECTOR"
            )
        self.residual = all(str(config.get("init_lora_weights")).startswith(RESIDUAL) for config in configs.values())
        """Whether the initialisation subtracts the first product of the factors from the base weight, so that both add up to the original weight."""

    def added(self, name: str) -> LowRank:
        """Return what the active adapters add to a tensor, in its shape; the factors are those in training, not copies."""
        layers = self._layers[name]
        parts = [
            factors_of(layer, adapter, self._whole) for layer in layers for adapter in layer.active_adapters if adapter in layer.scaling
        ]
        return LowRank(weight_shape(layers[0], self._shape), tuple(parts))

    def values(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Compute a tensor that an adapter changes in another way than by adding factors, in float64.

        Args:
            name: One of ``merged``.
            read: Returns a tensor of the start by its name.

        Raises:
            LataError: Peft cannot merge a layer of it.
        """
        values = read(name)
        for layer, leaf in self._changed[name]:
            base = dict(layer.get_base_layer().named_parameters(recurse=False))
            start = {other: values if other == leaf else read(self._saved[id(base[other])]) for other, _ in changed_parameters(layer)}
            values = merged_parameters(layer, start)[leaf]
        return values

    def check_merged(self, read: Callable[[str], Tensor]) -> None:
        """Merge the first layer of every kind, to find out before any work whether peft can do it.

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
        """Return whether a factor that is added to a tensor requires gradients."""
        return any(parameter.requires_grad for layer in self._layers[name] for parameter in layer.parameters())

    def _saved_name(self, name: str) -> str:
        saved = list(under_checkpoint_names(self.module, {name: torch.empty(self._shape(self.plain[name]), device="meta")}))
        if len(saved) != 1:
            raise LataError(refusal(f"a checkpoint stores the adapted weight {name} in {len(saved)} pieces"))
        return saved[0]


def peft_kinds() -> tuple[Any, ...]:
    """Return the class of models wrapped by peft; none as long as peft is not imported."""
    # What was never imported cannot have been used to build the module.
    peft = sys.modules.get("peft")
    return (peft.PeftModel,) if peft is not None else ()


def check_unwrapped(module: nn.Module) -> None:
    """Refuse a model with adapter layers but without ``peft.PeftModel`` around it: their weights would pass for those of the model.

    Raises:
        LataError: It holds such layers.
    """
    if "peft" not in sys.modules:
        return
    layers = [name for name, part in module.named_modules() if is_tuner(part)]
    if layers:
        raise LataError(
            f"adapters must be put on a model by peft.get_peft_model or PeftModel.from_pretrained, which record how to read them; there are adapters "
            f"without it on {first_three(layers)} (as by add_adapter or inject_adapter_in_model, or in a PeftMixedModel). Wrap the model itself."
        )


def is_packed(parameter: Tensor) -> bool:
    """Return whether a parameter holds quantised values: integers, or a tensor class of its own, as those of torchao."""
    if not parameter.is_floating_point():
        return True
    if type(parameter.data) is Tensor:
        return False
    # Sharded tensors import a compiler's worth of modules, which a command that reads files does not need.
    from torch.distributed.tensor import DTensor

    return type(parameter.data) is not DTensor


def packed_bytes(parameter: Tensor) -> Tensor:
    """Return the stored values of a quantised parameter; of a tensor class of its own, the bytes of all its tensors, flat."""
    data: Any = parameter.detach()
    if type(data.data) is Tensor:
        return parameter.detach()
    # By this protocol of torch, tensor classes tell which tensors they are made of.
    inner, _ = data.__tensor_flatten__()
    parts = [packed_bytes(getattr(data, name)) for name in inner]
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def _full_shape(name: str, parameter: Tensor, owner: Any) -> tuple[int, ...]:
    """Return the shape of a quantised weight before it was packed."""
    if parameter.is_floating_point():
        return tuple(parameter.shape)
    if not name.endswith("weight") or not hasattr(owner, "out_features"):
        raise LataError(refusal(f"{name} is quantised in a way that does not tell its shape"))
    return owner.out_features, owner.in_features


def _check_tied(base: nn.Module, active: set[str]) -> None:
    """Refuse trained copies of a tied weight under some of its names only: a checkpoint of the start has one tensor for all of them."""
    names_of: dict[int, list[str]] = {}
    parameters = {unwrapped(name): parameter for name, parameter in base.named_parameters(remove_duplicate=False)}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    copies = {_plain_name(name, active): id(parameter) for name, parameter in parameters.items() if ".modules_to_save." in name}
    for number, names in names_of.items():
        plain = [".".join(part for part in name.split(".") if part not in (*_WRAPPERS, "original_module")) for name in names]
        if len({copies.get(name, number) for name in plain}) > 1:
            raise LataError(
                f"a trained copy of a tied weight must be used under all of its names; it is used under some only of {first_three(plain)}. Pass "
                "ensure_weight_tying=True to LoraConfig."
            )


def _plain_name(name: str, adapters: set[str]) -> str | None:
    """Return the name of a parameter in the module without peft; None for the factors of an adapter, and for copies that are not in use."""
    if ".lora_" in name:
        return None
    parts = name.replace(".original_module.", ".").split(".")
    if "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        return ".".join(parts[:index] + parts[index + 2 :]) if parts[index + 1] in adapters else None
    return ".".join(part for part in parts if part not in _WRAPPERS)
