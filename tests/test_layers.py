import logging

import pytest
import torch
import transformers
from torch import nn

from lata_lightning.errors import LataError, differing, first_three
from lata_lightning.layers import LayerPosition, check_level, layer_map

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {**SMALL, "num_key_value_heads": 1, "vocab_size": 40}
ENCODER = {**SMALL, "vocab_size": 40}
BOTH_SIDES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
TOWER = {**SMALL, "projection_dim": 8}


def numbered(path, count=2):
    return [f"{path}.{index}" for index in range(count)]


# Model class, config class, settings, the blocks in running order, and some tensors with their places written down by hand.
ARCHITECTURES = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", {**CAUSAL, "num_hidden_layers": 11}, numbered("model.layers", 11),
        {
            "model.layers.10.self_attn.q_proj.weight": ("model.layers.10", "attention"),
            "model.layers.1.mlp.gate_proj.weight": ("model.layers.1", "mlp"),
            "model.layers.0.post_attention_layernorm.weight": ("model.layers.0", "norm"),
            "model.embed_tokens.weight": (None, "embedding"),
            "model.norm.weight": (None, "final_norm"),
            "lm_head.weight": (None, "head"),
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", {**CAUSAL, "head_dim": 8}, numbered("model.layers"),
        {
            "model.layers.0.pre_feedforward_layernorm.weight": ("model.layers.0", "norm"),
            "model.layers.0.post_feedforward_layernorm.weight": ("model.layers.0", "norm"),
            "model.layers.1.mlp.down_proj.weight": ("model.layers.1", "mlp"),
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}, numbered("transformer.h"),
        {
            "transformer.h.0.attn.c_attn.weight": ("transformer.h.0", "attention"),
            "transformer.h.1.mlp.c_fc.bias": ("transformer.h.1", "mlp"),
            "transformer.h.1.ln_2.weight": ("transformer.h.1", "norm"),
            "transformer.wte.weight": (None, "embedding"),
            "transformer.wpe.weight": (None, "embedding"),
            "transformer.ln_f.bias": (None, "final_norm"),
        },
    ),
    "bert": (
        "BertForMaskedLM", "BertConfig", ENCODER, numbered("bert.encoder.layer"),
        {
            "bert.encoder.layer.0.attention.self.query.weight": ("bert.encoder.layer.0", "attention"),
            "bert.encoder.layer.0.intermediate.dense.weight": ("bert.encoder.layer.0", "mlp"),
            "bert.encoder.layer.1.output.dense.bias": ("bert.encoder.layer.1", "mlp"),
            "bert.embeddings.LayerNorm.weight": (None, "embedding"),
            "cls.predictions.bias": (None, "head"),
        },
    ),
    "albert": (
        "AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 16}, ["encoder.albert_layer_groups.0.albert_layers.0"],
        {
            "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": ("encoder.albert_layer_groups.0.albert_layers.0", "mlp"),
            "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight": (
                "encoder.albert_layer_groups.0.albert_layers.0",
                "attention",
            ),
            "pooler.weight": (None, "head"),
        },
    ),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40},
        numbered("distilbert.transformer.layer"),
        {
            "distilbert.transformer.layer.0.attention.q_lin.weight": ("distilbert.transformer.layer.0", "attention"),
            "distilbert.transformer.layer.0.ffn.lin1.weight": ("distilbert.transformer.layer.0", "mlp"),
            "distilbert.transformer.layer.1.sa_layer_norm.bias": ("distilbert.transformer.layer.1", "norm"),
            "pre_classifier.weight": (None, "head"),
            "classifier.bias": (None, "head"),
        },
    ),
    "deberta": ("DebertaV2Model", "DebertaV2Config", ENCODER, numbered("encoder.layer"), {}),
    "t5": (
        "T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
        numbered("encoder.block") + numbered("decoder.block"),
        {
            "encoder.block.0.layer.0.SelfAttention.q.weight": ("encoder.block.0", "attention"),
            "decoder.block.1.layer.1.EncDecAttention.k.weight": ("decoder.block.1", "cross_attention"),
            "decoder.block.1.layer.2.DenseReluDense.wi.weight": ("decoder.block.1", "mlp"),
            "decoder.block.0.layer.2.layer_norm.weight": ("decoder.block.0", "norm"),
            "shared.weight": (None, "embedding"),
            "decoder.final_layer_norm.weight": (None, "final_norm"),
        },
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig", {**BOTH_SIDES, "forced_eos_token_id": None},
        numbered("model.encoder.layers") + numbered("model.decoder.layers"),
        {
            "model.decoder.layers.0.self_attn.q_proj.weight": ("model.decoder.layers.0", "attention"),
            "model.decoder.layers.0.encoder_attn.q_proj.weight": ("model.decoder.layers.0", "cross_attention"),
            "model.decoder.layers.0.encoder_attn_layer_norm.weight": ("model.decoder.layers.0", "norm"),
            "model.encoder.layers.1.fc1.weight": ("model.encoder.layers.1", "mlp"),
            "model.encoder.layernorm_embedding.weight": (None, "embedding"),
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", {**BOTH_SIDES, "num_mel_bins": 8, "begin_suppress_tokens": None},
        numbered("model.encoder.layers") + numbered("model.decoder.layers"),
        {"model.encoder.conv1.weight": (None, "other"), "model.encoder.layer_norm.weight": (None, "final_norm")},
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4}, numbered("vit.layers"),
        {
            "vit.layers.0.mlp.fc1.weight": ("vit.layers.0", "mlp"),
            "vit.layers.1.layernorm_before.weight": ("vit.layers.1", "norm"),
            "vit.embeddings.cls_token": (None, "embedding"),
            "vit.layernorm.weight": (None, "final_norm"),
            "classifier.weight": (None, "head"),
        },
    ),
    "swin": (
        "SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
        ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0", "encoder.layers.1.blocks.1"],
        {"encoder.layers.0.downsample.reduction.weight": (None, "other")},
    ),
    "segformer": (
        "SegformerModel", "SegformerConfig",
        {"depths": [2, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
         "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
        ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"],
        {"stages.1.patch_embeddings.proj.weight": (None, "embedding"), "stages.0.blocks.0.mlp.dwconv.dwconv.weight": ("stages.0.blocks.0", "mlp")},
    ),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": {**TOWER, "vocab_size": 40}, "vision_config": {**TOWER, "image_size": 8, "patch_size": 4}, "projection_dim": 8},
        numbered("text_model.encoder.layers") + numbered("vision_model.encoder.layers"),
        {
            "logit_scale": (None, "other"),
            "visual_projection.weight": (None, "other"),
            "vision_model.post_layernorm.weight": (None, "final_norm"),
            "text_model.embeddings.token_embedding.weight": (None, "embedding"),
        },
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**CAUSAL, "num_local_experts": 2}, numbered("model.layers"),
        {"model.layers.0.mlp.gate.weight": ("model.layers.0", "mlp"), "model.layers.1.mlp.experts.down_proj": ("model.layers.1", "mlp")},
    ),
    "deepseek": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**CAUSAL, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 8,
         "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        numbered("model.layers"),
        {
            "model.layers.0.self_attn.kv_a_layernorm.weight": ("model.layers.0", "attention"),
            "model.layers.1.mlp.shared_experts.up_proj.weight": ("model.layers.1", "mlp"),
        },
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}, numbered("transformer.h"),
        {
            "transformer.h.0.self_attention.query_key_value.bias": ("transformer.h.0", "attention"),
            "transformer.h.0.mlp.dense_h_to_4h.weight": ("transformer.h.0", "mlp"),
            "transformer.word_embeddings_layernorm.weight": (None, "embedding"),
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, numbered("gpt_neox.layers"),
        {"gpt_neox.layers.1.post_attention_layernorm.bias": ("gpt_neox.layers.1", "norm"), "gpt_neox.embed_in.weight": (None, "embedding")},
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40, "word_embed_proj_dim": 16},
        numbered("model.decoder.layers"),
        {
            "model.decoder.layers.0.final_layer_norm.weight": ("model.decoder.layers.0", "norm"),
            "model.decoder.final_layer_norm.weight": (None, "final_norm"),
        },
    ),
    "falcon": (
        "FalconForCausalLM", "FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40},
        numbered("transformer.h"), {"transformer.h.0.self_attention.dense.weight": ("transformer.h.0", "attention")},
    ),
    "phi3": (
        "Phi3ForCausalLM", "Phi3Config", {**CAUSAL, "pad_token_id": 0}, numbered("model.layers"),
        {"model.layers.0.self_attn.qkv_proj.weight": ("model.layers.0", "attention"), "model.layers.0.mlp.gate_up_proj.weight": ("model.layers.0", "mlp")},
    ),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {**CAUSAL, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4},
        numbered("model.layers", 4),
        {
            "model.layers.0.mamba.in_proj.weight": ("model.layers.0", "other"),
            "model.layers.1.self_attn.q_proj.weight": ("model.layers.1", "attention"),
            "model.layers.3.feed_forward.router.weight": ("model.layers.3", "mlp"),
            "model.layers.3.pre_ff_layernorm.weight": ("model.layers.3", "norm"),
        },
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}, numbered("backbone.layers"),
        {"backbone.layers.0.mixer.in_proj.weight": ("backbone.layers.0", "other"), "backbone.norm_f.weight": (None, "final_norm")},
    ),
    "wav2vec2": (
        "Wav2Vec2Model", "Wav2Vec2Config",
        {**SMALL, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (2, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2},
        numbered("encoder.layers"),
        {
            "feature_extractor.conv_layers.0.conv.weight": (None, "other"),
            "encoder.layers.0.feed_forward.output_dense.weight": ("encoder.layers.0", "mlp"),
            "masked_spec_embed": (None, "embedding"),
        },
    ),
    "resnet": (
        "ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
        numbered("encoder.stages"), {},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def empty_model(model_class, config_class, settings):
    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_parts_are_those_of_the_architecture_with_and_without_its_structure(architecture):
    model_class, config_class, settings, blocks, places = ARCHITECTURES[architecture]
    model = empty_model(model_class, config_class, settings)
    names = [name for name, _ in model.named_parameters()]

    with_structure, from_names = layer_map(names, structure=model), layer_map(names)

    assert list(with_structure.blocks) == blocks
    assert {name: tuple(with_structure.positions[name]) for name in places} == places
    assert with_structure == from_names
    assert list(with_structure.positions) == names, "every tensor has a place, and in the order given"
    listed = [name for inside in with_structure.layers().values() for name in inside]
    assert sorted([*listed, *with_structure.outside()]) == sorted(names)


def test_a_block_holds_exactly_the_tensors_below_its_own_path():
    # layers.1 must not take what belongs to layers.10.
    model = empty_model(*ARCHITECTURES["llama"][:3])
    found = layer_map([name for name, _ in model.named_parameters()], structure=model).layers()
    assert list(found) == numbered("model.layers", 11)
    for block, names in found.items():
        assert len(names) == 9
        assert all(name.startswith(block + ".") for name in names)


def test_a_mixture_of_experts_in_its_older_checkpoint_names_keeps_every_expert_in_its_block():
    names = [
        f"model.layers.{layer}.{tail}"
        for layer in range(2)
        for tail in [
            "self_attn.q_proj.weight",
            "block_sparse_moe.gate.weight",
            *(f"block_sparse_moe.experts.{expert}.w{matrix}.weight" for expert in range(8) for matrix in (1, 2, 3)),
            "input_layernorm.weight",
        ]
    ]
    by_names = layer_map(names)
    assert by_names.blocks == ("model.layers.0", "model.layers.1")
    assert {len(inside) for inside in by_names.layers().values()} == {27}
    assert by_names.positions["model.layers.1.block_sparse_moe.experts.7.w3.weight"] == LayerPosition("model.layers.1", "mlp")
    # The module of today has other names below its blocks; the map is the same.
    assert layer_map(names, structure=empty_model(*ARCHITECTURES["mixtral"][:3])) == by_names


def test_checkpoint_names_that_the_module_lacks_get_their_layer_from_the_name_alone():
    names = [
        f"vit.encoder.layer.{layer}.{tail}" for layer in range(2) for tail in ("attention.attention.query.weight", "output.dense.weight")
    ]
    found = layer_map([*names, "vit.layernorm.weight"], structure=empty_model(*ARCHITECTURES["vit"][:3]))
    assert found.blocks == ("vit.encoder.layer.0", "vit.encoder.layer.1")
    assert found.outside() == {"vit.layernorm.weight": "final_norm"}


def test_the_head_of_a_stored_pythia_is_a_head_although_it_is_named_after_the_embedding():
    names = ["gpt_neox.layers.0.attention.dense.weight", "gpt_neox.embed_in.weight", "embed_out.weight"]
    assert layer_map(names).outside() == {"gpt_neox.embed_in.weight": "embedding", "embed_out.weight": "head"}


def test_an_encoder_comes_before_its_decoder_in_names_of_any_order():
    names = [f"{side}.layers.{layer}.self_attn.q_proj.weight" for side in ("decoder", "encoder") for layer in (1, 0)]
    assert layer_map(names).blocks == ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1")


def test_layers_are_in_numeric_order_even_where_the_names_are_not():
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (10, 2, 1, 0, 11, 3, 4, 5, 6, 7, 8, 9)]
    assert list(layer_map(names).layers()) == numbered("model.layers", 12)


@pytest.mark.parametrize("level", ["block", "submodule", "tensor"])
def test_the_order_of_layers_does_not_depend_on_the_order_of_the_file(level):
    # Equal alignments are ranked in layer order, so another order would be another result.
    model = empty_model(*ARCHITECTURES["t5"][:3])
    names = [name for name, _ in model.named_parameters()]
    expected = list(layer_map(names, structure=model).layers(level))
    for shuffled in (names[::-1], sorted(names), names[1::2] + names[::2]):
        assert list(layer_map(shuffled, structure=model).layers(level)) == expected
        assert list(layer_map(shuffled).layers(level)) == expected


def test_the_three_levels_name_their_layers_after_block_part_and_tensor():
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ]
    found = layer_map(names)
    assert found.layers("block") == {"model.layers.0": [names[1], names[0], names[2]]}
    assert found.layers("submodule") == {"model.layers.0.attention": [names[1], names[0]], "model.layers.0.mlp": [names[2]]}
    assert found.layers("tensor") == {name: [name] for name in names[:3]}
    assert [found.layer_of(names[0], level) for level in ("block", "submodule", "tensor")] == [
        "model.layers.0",
        "model.layers.0.attention",
        names[0],
    ]
    assert found.layer_of("lm_head.weight", "tensor") is None
    assert found.outside() == {"lm_head.weight": "head"}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_layers_of_a_torch_transformer_encoder_are_its_blocks():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
    names = [name for name, _ in model.named_parameters()]
    found = layer_map(names, structure=model)
    assert found == layer_map(names)
    assert found.blocks == ("layers.0", "layers.1", "layers.2")
    assert found.positions["layers.0.self_attn.in_proj_weight"] == LayerPosition("layers.0", "attention")
    assert found.positions["layers.2.linear1.weight"] == LayerPosition("layers.2", "mlp")
    assert found.positions["layers.1.norm2.bias"] == LayerPosition("layers.1", "norm")


def test_the_cross_attention_of_a_torch_transformer_decoder_is_told_from_its_self_attention():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
    found = layer_map([name for name, _ in model.named_parameters()], structure=model)
    assert found.positions["layers.1.multihead_attn.in_proj_weight"] == LayerPosition("layers.1", "cross_attention")
    assert found.positions["layers.1.self_attn.out_proj.weight"] == LayerPosition("layers.1", "attention")


def test_the_linear_layers_of_a_sequential_mlp_are_its_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    assert layer_map(names, structure=model).blocks == ("0", "2", "4")
    assert layer_map(names).blocks == ("0", "2", "4")
    assert sorted(layer_map(names).layers()["2"]) == ["2.bias", "2.weight"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(2, 4)
        self.tower = nn.ModuleList([Residual() for _ in range(3)])
        self.numbers = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))])


def test_repeated_children_of_a_module_without_attention_are_its_blocks():
    model = Tower()
    names = [name for name, _ in model.named_parameters()]
    found = layer_map(names, structure=model)
    assert found.blocks == ("tower.0", "tower.1", "tower.2")
    assert found.positions["tower.1.scale"] == LayerPosition("tower.1", "other")
    assert set(found.outside()) == {"entry.weight", "entry.bias", "numbers.0", "numbers.1"}


class Plainly(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(4)
        self.one = nn.Linear(4, 4)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.stack = nn.ModuleList([Plainly(), Plainly()])
        self.last = nn.LayerNorm(4)


def test_where_names_tell_nothing_the_class_of_the_module_does():
    model = Named()
    found = layer_map([name for name, _ in model.named_parameters()], structure=model)
    assert found.positions["stack.0.before.weight"] == LayerPosition("stack.0", "norm")
    assert found.positions["stack.1.one.weight"] == LayerPosition("stack.1", "other")
    assert found.outside() == {"table.weight": "embedding", "last.weight": "final_norm", "last.bias": "final_norm"}


def test_a_model_without_any_repeated_part_has_no_layers():
    model = nn.Linear(3, 2)
    found = layer_map(["weight", "bias"], structure=model)
    assert found.blocks == ()
    assert found.layers() == {}
    assert found.outside() == {"weight": "other", "bias": "other"}


def test_no_names_give_an_empty_map():
    found = layer_map([])
    assert (found.blocks, found.layers(), found.outside()) == ((), {}, {})


NAMES = ["body.first.w", "body.second.w", "body.second.attention.w", "tail.w"]


@pytest.mark.parametrize(
    "rule",
    [
        lambda name: ".".join(name.split(".")[:2]) if name.startswith("body.") else None,
        r"^(?P<block>body\.\w+)\.",
        r"^body\.(first|second)",
    ],
    ids=["callable", "pattern with the group block", "whole match"],
)
def test_a_rule_names_the_blocks_of_a_module_of_no_known_layout(rule):
    found = layer_map(NAMES, rule=rule)
    assert found.blocks == ("body.first", "body.second")
    assert found.positions["body.second.attention.w"] == LayerPosition("body.second", "attention")
    assert found.positions["tail.w"] == LayerPosition(None, "other")


def test_a_rule_may_join_tensors_whose_names_do_not_begin_with_the_block():
    found = layer_map(["a_1.attn", "b_1.w", "a_10.w", "a_2.w"], rule=lambda name: "half " + name.split(".")[0].split("_")[1])
    assert found.layers() == {"half 1": ["a_1.attn", "b_1.w"], "half 2": ["a_2.w"], "half 10": ["a_10.w"]}
    assert found.positions["a_1.attn"].part == "attention"


def test_a_rule_that_matches_no_tensor_is_refused_with_the_names_it_saw():
    with pytest.raises(LataError, match=r"assigns none of the tensors .* 4: \['body.first.w'.*…\]"):
        layer_map(NAMES, rule=lambda name: None)
    with pytest.raises(LataError, match="assigns none of the tensors"):
        layer_map(NAMES, rule=r"layers\.\d+")


def test_a_rule_that_is_no_regular_expression_is_refused():
    with pytest.raises(LataError, match=r"'\(unclosed' is no regular expression"):
        layer_map(NAMES, rule="(unclosed")


def test_an_unknown_level_is_refused_with_the_choices():
    with pytest.raises(LataError, match="unknown level 'head'; choose one of block, submodule, tensor"):
        check_level("head")
    with pytest.raises(LataError, match="unknown level"):
        layer_map(["model.layers.0.self_attn.w"]).layers("heads")


def test_first_three_counts_sorts_and_shortens():
    assert first_three(["b", "a"]) == "2: ['a', 'b']"
    assert first_three("dbca") == "4: ['a', 'b', 'c', …]"


def test_differing_says_how_many_of_how_many_differ():
    assert differing(["b"], 57) == "1 of 57 tensors differs: ['b']"
    assert differing(["b", "a"], 9, "settings") == "2 of 9 settings differ: ['a', 'b']"
    assert differing("dbca") == "4 differ, first: ['a', 'b', 'c', …]"


def test_the_many_heads_of_attention_are_no_output_head():
    model = nn.ModuleDict(
        {"multihead_attn": nn.MultiheadAttention(4, 2), "multi_head_attention": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}
    )
    places = layer_map([name for name, _ in model.named_parameters()], structure=model).positions
    assert {name.split(".")[0]: place.part for name, place in places.items()} == {
        "multihead_attn": "other", "multi_head_attention": "other", "lm_head": "head"
    }  # fmt: skip
