"""Peft adapters on tiny models, and the sums they make, formed in float64 from the stored factors by the definition of LoRA."""

import json
import math
import re
import warnings

import peft
import pytest
import torch
import transformers
from architectures import loaded, tiny_model
from safetensors.torch import load_file
from tiny_models import read_back

from lata_lightning import TaskVector

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "bert": ["query", "dense"],
    "bert_classifier": ["query", "dense"],
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "fc1"],
    "vit": ["q_proj", "v_proj", "projection"],
    "clip_vision": ["q_proj", "patch_embedding"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def wrapped(model, *, seed=3, size=0.1, autocast=True, config=peft.LoraConfig, **options):
    """A model wrapped by peft, every trained parameter moved by noise as if trained."""
    options = {"r": 3, "lora_alpha": 5, **options} if config is peft.LoraConfig else options
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=autocast)
    noise_on(model, seed + 1, size)
    return model


def noise_on(model, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter.double() + size * noise)


def adapter(directory, name="llama", *, tied=False, dtype=torch.float32, adapter_name="adapter", **options):
    """Saves a start and an adapter on it; gives both directories and the model in memory."""
    start, place = directory / "start", directory / adapter_name
    if not start.exists():
        tiny_model(name, tied=tied, dtype=dtype).save_pretrained(start)
    model = wrapped(loaded(name, start), **{"target_modules": TARGETS[name], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(place)
    return start, place, model


def scale_of(config, stem, rank):
    alpha = next((value for key, value in config["alpha_pattern"].items() if re.search(rf"(^|\.){key}$", stem)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def names_in_file(start):
    """The name in the files for each name in the module, found by the values."""
    kind = json.loads((start / "config.json").read_text())["architectures"][0]
    module = getattr(transformers, kind).from_pretrained(start, dtype="auto")
    weights = read_back(start)
    pairs = (
        (name, [key for key, weight in weights.items() if torch.equal(weight, tensor)]) for name, tensor in module.state_dict().items()
    )
    # Fused experts lie in the files one by one.
    return {name: found[0] for name, found in pairs if found}


def by_hand(start, place):
    """What an adapter directory adds, in float64, from its two files and the files of its start alone; trained copies minus the originals."""
    config, held, weights = json.loads((place / CONFIG).read_text()), load_file(place / WEIGHTS), read_back(start)
    file_name = names_in_file(start)
    found = {}
    for key, tensor in held.items():
        stem = key.removeprefix("base_model.model.")
        if ".lora_A." in key or stem.endswith(".lora_embedding_A"):
            embedding = stem.endswith(".lora_embedding_A")
            stem = stem.removesuffix(".lora_embedding_A").removesuffix(".lora_A.weight")
            first = tensor.double()
            second = held[key.replace("_embedding_A", "_embedding_B").replace(".lora_A.", ".lora_B.")].double()
            product = torch.einsum("or,ri->oi", second.reshape(second.shape[0], -1), first.reshape(first.shape[0], -1))
            product = product.T if embedding or config["fan_in_fan_out"] else product
            name = file_name[f"{stem}.weight"]
            delta = scale_of(config, stem, first.shape[0]) * product.reshape(weights[name].shape)
            found[name] = found.get(name, 0) + delta
        elif ".lora_" not in key and ".base_layer.weight" not in key:
            name = file_name[stem.replace(".base_layer.", ".")]
            found[name] = tensor.double() - weights[name].double()
    return {name: delta for name, delta in found.items() if delta.any()}


def close(vector, expected):
    """The vector has these differences and no others; float32 may round each once."""
    for name in vector:
        if name in expected:
            torch.testing.assert_close(
                vector[name].double(), expected[name].double(), rtol=2e-7, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert not vector[name].any(), name
    assert set(expected) <= set(vector)


def refused(start, place, error, message):
    with pytest.raises(error, match=message) as caught:
        TaskVector.between(start, place)
    assert "\n" not in str(caught.value).strip()


def change_config(place, **changes):
    path = place / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
