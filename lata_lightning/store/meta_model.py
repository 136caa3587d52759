"""Transformers models without weights, built from a config: on the meta device, or with the buffers that no checkpoint stores."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lata_lightning.errors import SourceError


def meta_model(config: Mapping[str, Any] | None) -> nn.Module | None:
    """Return the model that a Hugging Face config describes, with all tensors on the meta device.

    Args:
        config: Content of config.json; None if there is none.

    Returns:
        The model; None where there is no config, or transformers cannot build a model from it.
    """
    if not config:
        return None
    import transformers

    architectures = config.get("architectures") or []
    model_class = getattr(transformers, str(architectures[0]), None) if architectures else None
    # The author of a config is unknown, so the class it names may only be that of a model.
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        return None
    if "auto_map" in config or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            return model_class(transformers.AutoConfig.for_model(config["model_type"], **settings))
    except Exception:
        # This release may refuse a config that another one wrote in any way. The weights can be read all the same, and layers follow from names alone.
        return None


def model_without_weights(config: Mapping[str, Any] | None, label: str) -> nn.Module:
    """Return the model that a Hugging Face config describes, in evaluation mode: parameters on the meta device, buffers with their values.

    Args:
        config: Content of config.json; None if there is none.
        label: What the config belongs to, for messages.

    Raises:
        SourceError: There is no config, or transformers cannot build the model from it.
    """
    plan = meta_model(config)
    if plan is None:
        raise SourceError(
            f"{label} does not say which model to run: a directory or hub id with the config.json of a transformers architecture is needed, or a module"
        )
    # On the meta device buffers would lose values that no checkpoint holds, such as rotary frequencies.
    handle = register_module_parameter_registration_hook(lambda module, name, parameter: _on_meta(parameter))  # type: ignore[arg-type]
    try:
        model: nn.Module = type(plan)(plan.config)
    finally:
        handle.remove()
    return model.eval()


def copy_without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module in evaluation mode: parameters on the meta device, buffers copied to the CPU."""
    memo: dict[int, Any] = {id(parameter): _on_meta(parameter) for parameter in module.parameters()}
    copied = copy.deepcopy(module, memo).eval()
    for part in copied.modules():
        part._buffers = {name: buffer if buffer is None or buffer.is_meta else buffer.cpu() for name, buffer in part._buffers.items()}
    return copied


def _on_meta(parameter: nn.Parameter | None) -> nn.Parameter | None:
    # A tied parameter is registered again, and must stay the same object.
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
