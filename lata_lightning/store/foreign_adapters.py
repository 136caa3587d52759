"""Refusal of parts of adapters among weights, which each library names in its own way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lata_lightning.errors import SourceError, first_three
from lata_lightning.store.meta_model import meta_model


class _Library(NamedTuple):
    """How a library names the parts of its adapters.

    Attributes:
        pattern: Found in every name of such a part, and in no name of a weight.
        who: The library, as the message names it.
        advice: How to get weights, or an adapter that is read.
    """

    pattern: re.Pattern[str]
    who: str
    advice: str


_LIBRARIES = (
    _Library(
        re.compile(
            r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|token_adapter|base_layer|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?"
            r"|ia3_l|oft_R|boft_[Rs]|vera_lambda_[bd]|gralora_[AB]|hira_[AB])\.|\.lora_embedding_[AB]$"
        ),
        "a model wrapped by peft",
        "the scaling of its adapters is not among the weights. Save the adapter with save_pretrained and give that directory",
    ),
    _Library(
        re.compile(r"(^|\.)lora_[AB]$"),
        "LoRA of LitGPT or loralib",
        "its scaling is not among the weights. Merge it first (litgpt merge_lora CHECKPOINT_DIR; with loralib, save after model.eval()) and give "
        "the merged weights",
    ),
    _Library(
        re.compile(r"(\.|_)lora_(up|down|mid)\.weight$|\.lora(_linear_layer)?\d*\.(up|down)\.weight$|^lora_(unet|te\d?|prior)_"),
        "LoRA of kohya or diffusers",
        "its names are not those of the layers. Load and fuse it with diffusers (pipe.load_lora_weights, pipe.fuse_lora) and give the fused weights",
    ),
    _Library(
        re.compile(r"(^|\.)lora_[ab](\.weight)?$"),
        "LoRA of torchtune or MLX",
        "its scaling is not among the weights. Give the adapter that torchtune saves in peft's format (adapter_config.json), or the merged weights "
        "(mlx_lm.fuse)",
    ),
    _Library(
        re.compile(r"\.(adapter_layer|lora_\w+_adapter|adapter)\.(.*\.)?linear_(in|out)\.weight$"),
        "adapters of NeMo or Megatron",
        "their scaling is not among the weights. Merge them first and give the merged weights",
    ),
)


def check_no_factors(names: Iterable[str], label: str, config: Mapping[str, Any] | None = None) -> None:
    """Refuse weights among which there are parts of adapters: each would pass for a weight of its own.

    Args:
        names: Names of the tensors.
        label: Where they come from, for the message.
        config: Config of the model, if it has one. Names of parameters of its architecture are those of weights, not of parts of adapters.

    Raises:
        SourceError: There are such parts; the message says whose, and what to give instead.
    """
    listed = list(names)
    for library in _LIBRARIES:
        parts = [name for name in listed if library.pattern.search(name)]
        if parts and config is not None:
            module = meta_model(config)
            parts = parts if module is None else sorted(set(parts) - set(module.state_dict()))
        if parts:
            raise SourceError(f"{label} holds {library.who} that is not merged, {first_three(parts)}, and {library.advice}.")
