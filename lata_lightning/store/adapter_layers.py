"""One adapted layer of a peft model: what it is, what it changes, and its factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lata_lightning.errors import LataError
from lata_lightning.numerics.low_rank import Factors
from lata_lightning.store.merged_layers import KINDS


def is_tuner(module: nn.Module) -> bool:
    """Return whether a module is a layer with adapters on it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def check_kind(adapter: str, config: Any) -> None:
    """Refuse an adapter of a kind that changes no weight, or that is not read.

    Args:
        adapter: Name of the adapter, for messages.
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
        raise LataError(f"the adapter {adapter!r} repeats layers (layer_replication): it has other tensors than its start")


def check_layer(name: str, layer: Any) -> None:
    """Refuse a layer whose adapters cannot be read as a change of its weights.

    Args:
        name: Path of the layer, for the message.
        layer: A peft layer.

    Raises:
        LataError: The layer is merged, or its adapters depend on the input, train the weight itself, or cannot be merged by peft.
    """
    kind, weight = type(layer).__name__, getattr(layer.get_base_layer(), "weight", None)
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()} if _is_lora(layer) else set()
    what = None
    if kind in ("ParamWrapper", "MultiheadAttention"):
        what = f"adapts a parameter that is no weight of a layer ({kind})"
    elif any(not variant.startswith("Dora") for variant in variants):
        what = f"is a variant of LoRA that depends on its input, or that peft cannot merge ({', '.join(sorted(variants))})"
    elif layer.merged:
        what = "is merged into its base weight; call unmerge_adapter() first"
    elif is_plain_lora(layer) and getattr(layer.get_base_layer(), "groups", 1) > 1:
        what = "adapts a grouped convolution, which peft cannot merge"
    elif not isinstance(weight, nn.Parameter):
        what = "adapts a weight that is no parameter, but computed from others (as under weight_norm, or quantised by GPTQ or AWQ)"
    elif weight.requires_grad:
        what = "trains the weight under it as well"
    if what is not None:
        raise LataError(refusal(f"the adapter on {name} {what}"))


def _is_lora(layer: Any) -> bool:
    """Return whether a layer is one of LoRA, and not of another kind that is built on LoRA."""
    from peft.tuners import lora

    return isinstance(layer, lora.LoraLayer) and type(layer).__module__.startswith("peft.tuners.lora")


def is_plain_lora(layer: Any) -> bool:
    """Return whether a layer only adds scaling · B @ A to its weight."""
    return _is_lora(layer) and not layer.lora_variant and not any(layer.lora_bias.values())


def kind_of(layer: Any) -> str:
    """Return what a kind of layer is called in messages."""
    if _is_lora(layer):
        return "DoRA" if layer.lora_variant else "LoRA with a bias"
    # Each kind of adapter has a package of its own.
    return str(type(layer).__module__.split(".")[2])


def changed_parameters(layer: Any) -> list[tuple[str, Tensor]]:
    """Return the parameters of a base layer that merging can change, each with its name in the base layer."""
    parameters = list(layer.get_base_layer().named_parameters(recurse=False))
    if not _is_lora(layer):
        return parameters
    return [(leaf, parameter) for leaf, parameter in parameters if leaf == "weight" or any(layer.lora_bias.values())]


def refusal(what: str) -> str:
    """Return the message about an adapter that cannot be read, with what to do instead."""
    return (
        f"adapters are read by what they change in the weights, and {what}. If peft can merge it, save what merge_and_unload() gives and extract from "
        "that: lata extract START MERGED --output VECTOR"
    )


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter that is in memory whole."""
    return tuple(parameter.shape)


def weight_shape(layer: Any, shape: Callable[[Tensor], tuple[int, ...]] = shape_of) -> tuple[int, ...]:
    """Return the shape of the base weight of a layer, which may be quantised.

    Args:
        layer: An adapted layer.
        shape: Gives the whole shape of a parameter, which a strategy may have spread over processes.
    """
    weight = layer.get_base_layer().weight
    return shape(weight) if weight.is_floating_point() else (layer.out_features, layer.in_features)


def factors_of(layer: Any, adapter: str, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Factors:
    """Return what an adapter of plain LoRA adds to the weight of a layer; the factors are those in training, not copies.

    Args:
        layer: An adapted layer.
        adapter: Name of the adapter.
        whole: Gives all values of a factor, which a strategy may have spread over processes.
    """
    scale = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        # peft multiplies B @ A and transposes the product.
        return Factors(whole(layer.lora_embedding_A[adapter]).T, whole(layer.lora_embedding_B[adapter]).T, scale)
    first, second = whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight)
    # The second factor of a convolution has a kernel of one entry.
    first, second = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
    return Factors(first.T, second.T, scale) if getattr(layer, "fan_in_fan_out", False) else Factors(second, first, scale)
