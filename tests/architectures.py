"""Tiny models of many architectures, built by transformers alone: seeded, every tensor of them without zeros, tied or not where there is the choice."""

from typing import NamedTuple

import pytest
import torch
import transformers

VOCABULARY = 24
_NO_MARKS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    **_NO_MARKS,
}
_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


class Architecture(NamedTuple):
    """What transformers needs to build one.

    Attributes:
        kind: ``decoder``, ``encoder``, ``encoder-decoder``, ``vision`` or ``experts``.
        model: Class of the model.
        config: Class of its config.
        settings: For the config.
        ties: Whether embeddings and head are tied by choice (those of T5 are by transformers, whatever its config says).
    """

    kind: str
    model: type
    config: type
    settings: dict
    ties: bool


ARCHITECTURES = {
    "llama": Architecture("decoder", transformers.LlamaForCausalLM, transformers.LlamaConfig, _LLAMA, True),
    "gemma2": Architecture(
        "decoder",
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
        True,
    ),
    "gpt2": Architecture(
        "decoder",
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_NO_MARKS},
        True,
    ),
    "gpt_neox": Architecture(
        "decoder",
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
        True,
    ),
    "bert": Architecture(
        "encoder",
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"pad_token_id": 0},
        True,
    ),
    "bert_classifier": Architecture(
        "encoder",
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"pad_token_id": 0, "num_labels": 3},
        False,
    ),
    "t5": Architecture(
        "encoder-decoder",
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
        False,
    ),
    "bart": Architecture(
        "encoder-decoder",
        transformers.BartForConditionalGeneration,
        transformers.BartConfig,
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 32,
            "forced_eos_token_id": None,
        },
        True,
    ),
    "vit": Architecture("vision", transformers.ViTForImageClassification, transformers.ViTConfig, {**_IMAGE, "num_labels": 3}, False),
    "clip_vision": Architecture(
        "vision", transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {**_IMAGE, "projection_dim": 8}, False
    ),
    "mixtral": Architecture(
        "experts",
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        True,
    ),
    "qwen3_moe": Architecture(
        "experts",
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
        True,
    ),
}
_VARIANTS = [(name, tied) for name, entry in ARCHITECTURES.items() for tied in ((False, True) if entry.ties else (False,))]
every_architecture = pytest.mark.parametrize(
    ("name", "tied"),
    _VARIANTS,
    ids=[f"{name}-{'tied' if tied else 'untied'}" if ARCHITECTURES[name].ties else name for name, tied in _VARIANTS],
)
"""Runs a test with the name of every architecture, and tied or not where it has the choice."""
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def tiny_model(name, *, seed=0, tied=False, dtype=torch.float32):
    """A model of an architecture, in evaluation mode; no tensor is left at the zeros or ones it is initialised with."""
    entry = ARCHITECTURES[name]
    settings = {**entry.settings, "tie_word_embeddings": tied} if entry.ties else entry.settings
    torch.manual_seed(seed)
    model = entry.model(entry.config(**settings))
    return moved(model.to(dtype).eval(), seed=seed + 1000, spread=0.1)


def moved(model, *, seed, spread=0.05):
    """The same model, every parameter moved by noise that is formed in float64; on a half-precision model, onto a grid.

    Differences of half-precision numbers on one grid fit into float32 exactly, whatever their exponents.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = parameter.double() + spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values if parameter.dtype == torch.float32 else torch.round(values * 2**14) / 2**14)
    return model


def save_family(directory, name, *, tied=False, dtype=torch.float32):
    """Directories ``base``, ``start``, ``tuned-1`` and ``tuned-2`` of one architecture, saved by transformers; by name.

    Start is base, moved; the tuned models are start, moved.
    """
    saved = {label: directory / label for label in ("base", "start", "tuned-1", "tuned-2")}
    tiny_model(name, tied=tied, dtype=dtype).save_pretrained(saved["base"])
    for seed, (label, origin) in enumerate([("start", "base"), ("tuned-1", "start"), ("tuned-2", "start")]):
        moved(loaded(name, saved[origin]), seed=10 + seed).save_pretrained(saved[label])
    return saved


def loaded(name, directory, **options):
    """What transformers reads from a directory, in the dtype it is stored in."""
    return ARCHITECTURES[name].model.from_pretrained(directory, dtype="auto", **options)


@torch.no_grad()
def outputs_of(name, model):
    """What a model answers to two rows of tokens, or two images, in float32: logits, or hidden states where it has no head."""
    tokens = torch.arange(1, 13).reshape(2, 6)
    inputs = {
        "vision": {"pixel_values": torch.linspace(-20, 20, 2 * 8 * 8).sin().reshape(2, 1, 8, 8)},
        "encoder-decoder": {"input_ids": tokens, "decoder_input_ids": tokens.flip(0)},
    }.get(ARCHITECTURES[name].kind, {"input_ids": tokens})
    found = model.float().eval()(**inputs)
    return found["logits"] if "logits" in found else found["last_hidden_state"]
