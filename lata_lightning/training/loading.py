"""Preparing Hugging Face models for training: loading, quantising to four bits, adding adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from lata_lightning.errors import LataError, SourceError, first_line, first_three
from lata_lightning.evaluation.heads import check_head, class_names
from lata_lightning.store.head_files import Head


def load_causal_lm(source: str, dtype: str = "float32", *, quantize: bool = False) -> Any:
    """Load a Hugging Face causal language model from a directory or hub id, in evaluation mode.

    Args:
        source: Directory or hub id.
        dtype: Name of the torch dtype of the weights.
        quantize: Quantise the matrices of the blocks to four bits (NF4, double quantisation), as QLoRA does.

    Raises:
        LataError: ``quantize`` without bitsandbytes.
        SourceError: The model cannot be loaded; the message gives the reason.
    """
    more: dict[str, Any] = {}
    if quantize:
        if find_spec("bitsandbytes") is None:
            raise LataError(
                "four-bit weights need bitsandbytes, which is not installed: pip install bitsandbytes, or train without quantize"
            )
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        if torch.cuda.is_available():
            # Quantised weights stay on the device that quantised them, so each process uses its own.
            more["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **more)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load {source!r} as a causal language model: {first_line(error)}") from error


def load_classifier(source: str, dtype: str = "float32", heads: Sequence[Head] = ()) -> Any:
    """Load a Hugging Face model for sequence classification from a directory or hub id, in evaluation mode.

    Args:
        source: Directory or hub id.
        dtype: Name of the torch dtype of the weights.
        heads: Heads that the model is to be scored with, one at a time (see ``with_head``). Each has to hold what is not stored; what is stored stays in
            the model, also where a head holds it too, as a pooler. The model gets the classes of the first head and their names.

    Raises:
        LataError: A tensor is neither stored nor part of every head, or a head does not fit the model.
        SourceError: The model cannot be loaded; the message gives the reason.
    """
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if heads:
        settings |= {"config": _config_with(source, heads[0]), "ignore_mismatched_sizes": True}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(source, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"cannot load {source!r} as a classifier of texts: {first_line(error)}") from error
    unstored = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    for given in [set(head.tensors) for head in heads] or [set[str]()]:
        if missing := unstored - given:
            advice = (
                "Give the head of a fine-tune of this model."
                if heads
                else "Give a model directory with its classification head, or name a head that a fine-tune saved beside its task vector: --head RUN/lata."
            )
            raise LataError(
                f"a classifier must hold all its weights; {source!r} lacks {first_three(missing)}, which would be random numbers. {advice}"
            )
    for head in heads:
        check_head(model, head, repr(source))
    return model


def _config_with(source: str, head: Head) -> Any:
    """Return the config of a model with the classes of a head."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load {source!r} as a classifier of texts: {first_line(error)}") from error
    head.check_model(config.model_type, repr(source))
    config.id2label, config.label2id = class_names(head)
    return config


def load_tokenizer(source: str) -> Any:
    """Load a Hugging Face tokenizer from a directory or hub id.

    Raises:
        SourceError: There is no tokenizer, or it cannot be loaded; the message gives the reason.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"{source} holds no tokenizer that can be loaded ({first_line(error)}). Give a directory or hub id that has one, or copy the tokenizer "
            "files of the start model into the directory."
        ) from error


def with_adapters(model: Any, lora: Mapping[str, Any], *, quantized: bool = False) -> Any:
    """Wrap a model with new LoRA adapters of peft, which start at zero; its own weights are frozen.

    Args:
        model: Causal language model of transformers; changed in place.
        lora: Arguments of ``peft.LoraConfig``; ``target_modules`` may be left out where peft knows the architecture.
        quantized: Whether the weights are quantised to four bits.

    Raises:
        LataError: An argument is unknown, or no module has the given names.
    """
    known = LoraConfig.__dataclass_fields__
    unknown = [name for name in lora if name not in known]
    if unknown:
        raise LataError(
            f"lora takes the arguments of peft.LoraConfig, unknown are {first_three(unknown)}; some it knows: r, lora_alpha, target_modules"
        )
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
    except (TypeError, ValueError) as error:
        raise LataError(f"peft cannot put adapters into the model: {first_line(error)}") from error
