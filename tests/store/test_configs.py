"""Comparing configs; the expected completions are those of transformers' own config classes."""

import json

import pytest
from transformers import AutoConfig

from lata_lightning.store.configs import config_differences, relevant

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2}
BERT = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2}
QWEN2 = {"model_type": "qwen2", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "change", "key"),
    [
        (LLAMA, {"rope_theta": 5e5}, "rope_parameters.rope_theta"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_parameters.rope_theta"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type"),
        (LLAMA, {"num_attention_heads": 4, "head_dim": 4}, "num_attention_heads"),
        (LLAMA, {"num_key_value_heads": 1}, "num_key_value_heads"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        (LLAMA, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({**LLAMA, "a_key_of_nobody": 2}, {"a_key_of_nobody": 3}, "a_key_of_nobody"),
        ({"hidden_size": 16, "num_attention_heads": 2}, {"model_type": "bert", "hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "dbrx"}, {"attn_config": {"rope_theta": 5.0}}, "attn_config.rope_theta"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}, "rope_parameters.partial_rotary_factor"),
        (LLAMA, {"model_type": "mistral"}, "model_type"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window"),
        ({**LLAMA, "model_type": "mistral"}, {"sliding_window": 16}, "sliding_window"),
        (GPT2, {"activation_function": "relu"}, "activation_function"),
        (GPT2, {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"n_head": 4}, "n_head"),
        (BERT, {"hidden_act": "relu"}, "hidden_act"),
        (BERT, {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        (BERT, {"is_decoder": True}, "is_decoder"),
        ({"model_type": "t5"}, {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj"),
        ({"model_type": "t5"}, {"relative_attention_max_distance": 64}, "relative_attention_max_distance"),
        ({"model_type": "mixtral"}, {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ({"model_type": "clip"}, {"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act"),
        ({"model_type": "clip"}, {"text_config": {"layer_norm_eps": 1e-3}}, "text_config.layer_norm_eps"),
        ({"model_type": "mamba2"}, {"time_step_limit": [0.0, 5.0]}, "time_step_limit"),
        ({"model_type": "made-up", "window": 4}, {"window": 8}, "window"),
        ({"model_type": "made-up"}, {"window": 8}, "window"),
        ({"model_type": "made-up", "inner": {"eps": 1e-5}}, {"inner": {"eps": 1e-6}}, "inner.eps"),
    ],
)
def test_a_key_that_changes_the_function_is_named_whatever_side_has_it(config, change, key):
    assert key in config_differences(config, {**config, **change})
    assert key in config_differences({**config, **change}, config)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # A default that is written down, and one that is not.
        (LLAMA, {**LLAMA, "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_key_value_heads": 2, "head_dim": 8}),
        # The old spelling and the new one.
        ({**LLAMA, "rope_theta": 5e5}, {**LLAMA, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
        (
            {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        ({**LLAMA, "rope_scaling": None}, LLAMA),
        # The longest input that is allowed, where nothing else is derived from it.
        ({**LLAMA, "max_position_embeddings": 8192}, LLAMA),
        # Where a window would begin to slide, where none does.
        ({**QWEN2, "max_window_layers": 21, "use_sliding_window": False}, {**QWEN2, "max_window_layers": 24}),
        ({"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]}, {"model_type": "mamba2"}),
        (
            {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]},
            {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]},
        ),
        # What a release or tool wrote that the config class does not have.
        ({**BERT, "position_embedding_type": "absolute"}, BERT),
        ({**LLAMA, "neftune_noise_alpha": 5, "is_llama_config": True}, LLAMA),
        ({"model_type": "clip", "text_config": {"a_key_of_nobody": 3}}, {"model_type": "clip"}),
        ({"model_type": "gemma2", "cache_implementation": "hybrid"}, {"model_type": "gemma2", "cache_implementation": None}),
        # The first configs named no type of their model.
        ({"hidden_size": 16, "num_attention_heads": 2}, BERT),
        ({"model_type": "made-up", "flag": False}, {"model_type": "made-up", "flag": None}),
    ],
)
def test_two_spellings_of_one_function_do_not_differ(one, other):
    assert config_differences(one, other) == {}
    assert config_differences(other, one) == {}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}])
def test_the_longest_input_counts_where_the_rotary_embedding_is_derived_from_it(rope):
    one = {**LLAMA, "rope_parameters": rope}
    assert list(config_differences(one, {**one, "max_position_embeddings": 4096})) == ["max_position_embeddings"]


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "elsewhere", "transformers_version": "4.0", "architectures": ["LlamaForSequenceClassification"]},
        {"torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False, "attn_implementation": "eager"},
        {"eos_token_id": 7, "bos_token_id": 8, "pad_token_id": 9, "vocab_size": 65},
        {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}, "label2id": {"no": 0}, "problem_type": "regression"},
        {"attention_dropout": 0.1, "initializer_range": 0.5, "classifier_dropout": 0.2},
        {"do_sample": True, "num_beams": 4, "max_length": 20},
        {"unsloth_version": "2025", "unsloth_fixed": True, "quantization_config": {"bits": 4}},
    ],
)
def test_keys_that_do_not_change_the_function_do_not_count(change):
    for config in (LLAMA, {"model_type": "made-up"}):
        assert config_differences(config, {**config, **change}) == {}


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3", "qwen2_vl", "clip", "t5", "bart", "gpt_neox", "mamba2", "mixtral", "vit", "whisper", "deepseek_v3"]
)
def test_what_transformers_writes_in_short_or_in_full_is_one_config(kind):
    config = AutoConfig.for_model(kind)
    short, full = json.loads(config.to_json_string()), config.to_dict()
    assert config_differences(short, full) == {}
    recorded = json.loads(json.dumps(relevant(full), allow_nan=False))
    assert config_differences(recorded, short) == {}
    assert relevant(recorded) == recorded
