"""AttentionOnlyFinetuning: what moves in a fit, against lists of names written down by hand."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from conformance import Recorded, expected_vector, instruct, values
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_models import EXPECTED_WARNINGS, Module, batches, tiny_llama, trainer
from tiny_models import read_back, same_bits
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lata_lightning import AttentionOnlyFinetuning, LATACallback, LataError, TaskVector
from lata_lightning.live.projections import attention_projections

pytestmark = EXPECTED_WARNINGS

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {**SMALL, "num_key_value_heads": 1, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**SMALL, "vocab_size": 40}
TOWER = {**SMALL, "projection_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TOKENS = torch.arange(3, 19).reshape(2, 8)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TEXT = {"input_ids": TOKENS}
PICTURE = {"pixel_values": PIXELS}
BOTH_SIDES = {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}


def under(paths, *projections):
    """Weight names of the projections below each path."""
    return {f"{path}.{projection}.weight" for path in paths for projection in projections}


def numbered(path, suffix=""):
    return [f"{path}.{index}{suffix}" for index in range(2)]


# Model class, config class, settings, inputs, and the names of all projection matrices, written down by hand.
ARCHITECTURES = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", {**CAUSAL, "attention_bias": True}, TEXT,
        under(numbered("model.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", {**CAUSAL, "head_dim": 8}, TEXT,
        under(numbered("model.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "qwen3, which has norms inside attention": (
        "Qwen3ForCausalLM", "Qwen3Config", {**CAUSAL, "head_dim": 8}, TEXT,
        under(numbered("model.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, **SPECIAL}, TEXT,
        under(numbered("transformer.h", ".attn"), "c_attn", "c_proj"),
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**ENCODER, **SPECIAL}, TEXT,
        under(numbered("gpt_neox.layers", ".attention"), "query_key_value", "dense"),
    ),
    "phi3": (
        "Phi3ForCausalLM", "Phi3Config", CAUSAL, TEXT, under(numbered("model.layers", ".self_attn"), "qkv_proj", "o_proj"),
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**CAUSAL, "num_local_experts": 2}, TEXT,
        under(numbered("model.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "deepseek, with low-rank factors": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**CAUSAL, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 8,
         "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
         "num_experts_per_tok": 2},
        TEXT,
        under(numbered("model.layers", ".self_attn"), "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
    "gpt-oss, with sinks": (
        "GptOssForCausalLM", "GptOssConfig", {**CAUSAL, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, TEXT,
        under(numbered("model.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "bert": (
        "BertForMaskedLM", "BertConfig", ENCODER, TEXT,
        under(numbered("bert.encoder.layer", ".attention.self"), "query", "key", "value")
        | under(numbered("bert.encoder.layer", ".attention.output"), "dense"),
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}, BOTH_SIDES,
        under(numbered("encoder.block", ".layer.0.SelfAttention"), "q", "k", "v", "o")
        | under(numbered("decoder.block", ".layer.0.SelfAttention"), "q", "k", "v", "o")
        | under(numbered("decoder.block", ".layer.1.EncDecAttention"), "q", "k", "v", "o"),
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40, **SPECIAL, "decoder_start_token_id": 1, "forced_eos_token_id": None},
        BOTH_SIDES,
        under(numbered("model.encoder.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "out_proj")
        | under(numbered("model.decoder.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "out_proj")
        | under(numbered("model.decoder.layers", ".encoder_attn"), "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**SMALL, **IMAGE}, PICTURE,
        under(numbered("vit.layers", ".attention"), "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "swin, with a table of positions": (
        "SwinModel", "SwinConfig",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "drop_path_rate": 0.0}, PICTURE,
        under([f"encoder.layers.{stage}.blocks.0.attention" for stage in range(2)], "q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": {**TOWER, "vocab_size": 40, **SPECIAL}, "vision_config": {**TOWER, **IMAGE}, "projection_dim": 8}, {**TEXT, **PICTURE},
        under(numbered("text_model.encoder.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "out_proj")
        | under(numbered("vision_model.encoder.layers", ".self_attn"), "q_proj", "k_proj", "v_proj", "out_proj"),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def build(architecture):
    model_class, config_class, settings, inputs, expected = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)), inputs, expected


class Anything(pl.LightningModule):
    """Trains any model to make its first output small, with an optimizer over all parameters that decays them."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model.train(), inputs

    def training_step(self, batch, batch_idx):
        found = self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(*self.inputs)
        found = found if isinstance(found, torch.Tensor) else found[0]
        return (found - torch.linspace(-1, 1, found.numel()).reshape(found.shape)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


def moved(module, *callbacks, directory, **options):
    """Names in the model that a fit has changed."""
    before = values(module.model)
    trainer(directory, *callbacks, **{"max_epochs": 1, "logger": False, **options}).fit(module, DataLoader(range(2)))
    return {name for name, tensor in values(module.model).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fit_moves_the_projection_matrices_and_nothing_else(tmp_path, architecture):
    model, inputs, expected = build(architecture)
    assert moved(Anything(model, inputs), AttentionOnlyFinetuning(), directory=tmp_path) == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


class Attentive(nn.Module):
    """A layer of torch's own attention, whose keys and values have another width, so that it holds them apart."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True, batch_first=True)

    def forward(self, query, key, value):
        return self.attn(query, key, value)[0]


def test_torchs_own_attention_is_found_fused_and_apart(tmp_path):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    found = moved(Anything(encoder, (torch.randn(2, 4, 8),)), AttentionOnlyFinetuning(), directory=tmp_path)
    assert found == {f"layers.{n}.self_attn.{name}" for n in range(2) for name in ("in_proj_weight", "out_proj.weight")}
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    found = moved(Anything(decoder, (torch.randn(2, 4, 8), torch.randn(2, 4, 8))), AttentionOnlyFinetuning(), directory=tmp_path)
    names = [f"{attention}.{name}" for attention in ("self_attn", "multihead_attn") for name in ("in_proj_weight", "out_proj.weight")]
    assert found == {f"layers.{n}.{name}" for n in range(2) for name in names}
    # In no list of blocks at all; and the learned extra key and value are no projections.
    inputs = (torch.randn(2, 4, 8), torch.randn(2, 4, 4), torch.randn(2, 4, 6))
    found = moved(Anything(Attentive(), inputs), AttentionOnlyFinetuning(), directory=tmp_path)
    assert found == {"attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "gpt-neox"])
def test_with_train_bias_their_biases_move_too_and_no_others(tmp_path, architecture):
    model, inputs, expected = build(architecture)
    expected = expected | {name.replace("weight", "bias") for name in expected}
    assert moved(Anything(model, inputs), AttentionOnlyFinetuning(train_bias=True), directory=tmp_path) == expected


def test_with_train_bias_the_fused_bias_of_torchs_own_attention_moves_too(tmp_path):
    module = Anything(Attentive(), (torch.randn(2, 4, 8), torch.randn(2, 4, 4), torch.randn(2, 4, 6)))
    found = moved(module, AttentionOnlyFinetuning(train_bias=True), directory=tmp_path)
    assert {name for name in found if "bias" in name} == {"attn.in_proj_bias", "attn.out_proj.bias"}


def test_wrapped_linear_maps_and_bare_parameters_are_projections_but_gates_and_positions_are_not():
    class Wrapped(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, nn.Linear(4, 4))

    class OddAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = Wrapped("linear")
            self.v_proj = Wrapped("norm")
            self.k = nn.Parameter(torch.zeros(4, 2, 2))
            self.r = nn.Parameter(torch.zeros(4, 2, 2))
            self.q_pos_proj = nn.Linear(4, 4)
            self.output_gate = nn.Linear(4, 4)
            self.value_embedding = nn.Embedding(4, 4)
            self.value = nn.Embedding(4, 4)
            self.indexer = nn.ModuleDict({"wq_b": nn.Linear(4, 4)})
            self.query_bias = nn.Parameter(torch.zeros(4))

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": OddAttention()}) for _ in range(2)])})
    names = {name for name in attention_projections(model) if ".0." in name}
    assert names == {"blocks.0.attn.q_proj.linear.weight", "blocks.0.attn.k"}
    biases = {name for name in attention_projections(model, train_bias=True) if ".0." in name} - names
    assert biases == {"blocks.0.attn.q_proj.linear.bias", "blocks.0.attn.query_bias"}


def test_shared_blocks_are_found_once_and_compiled_ones_under_their_plain_names():
    block = tiny_llama().model.layers[0]
    shared = nn.ModuleDict({"layers": nn.ModuleList([block, block])})
    assert set(attention_projections(shared)) == under(["layers.0.self_attn"], "q_proj", "k_proj", "v_proj", "o_proj")
    model = tiny_llama()
    plain = list(attention_projections(model))
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert list(attention_projections(model)) == plain


def test_it_says_what_it_trains(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, AttentionOnlyFinetuning(), max_steps=1).fit(Module(tiny_llama()), batches())
    # Three blocks of q and o (16 x 16) and k and v (8 x 16); with MLPs of 3 x 16 x 24, two norms each, embedding, head and last norm.
    trained, total = 3 * (2 * 256 + 2 * 128), 3 * (768 + 1152 + 32) + 2 * 32 * 16 + 16
    assert f"{trained:,} parameters in 12 tensors are trained, of {total:,} in 30" in caplog.text


class EarlyOptimizer(Module):
    """Built its optimizer before there was a trainer, and has gradients from then; never sets gradients to None."""

    def __init__(self, model):
        super().__init__(model)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)
        self.automatic_optimization = False
        self.training_step_of_before(next(iter(batches())))

    def training_step_of_before(self, batch):
        self.model(input_ids=batch, labels=batch).loss.backward()

    def training_step(self, batch, batch_idx):
        self.optimizer.zero_grad(set_to_none=False)
        self.training_step_of_before(batch)
        self.optimizer.step()

    def configure_optimizers(self):
        return self.optimizer


def test_an_optimizer_that_was_there_before_moves_no_frozen_parameter(tmp_path):
    module = EarlyOptimizer(tiny_llama())
    before = values(module.model)
    trainer(tmp_path, AttentionOnlyFinetuning()).fit(module, batches())
    found = {name for name, tensor in values(module.model).items() if not torch.equal(tensor, before[name])}
    assert found == {name for name in before if "self_attn" in name}


class Late(Recorded):
    """Builds its model in a hook."""

    def __init__(self, models, hook):
        super().__init__(None)
        self.models, self.hook = models, hook

    def setup(self, stage):
        self.build("setup")

    def configure_model(self):
        self.build("configure_model")

    def build(self, hook):
        if self.hook == hook and self.model is None:
            self.model = LlamaForCausalLM.from_pretrained(self.models / "instruct")

    def configure_optimizers(self):
        self.seen = sum(parameter.requires_grad for parameter in self.parameters())
        return super().configure_optimizers()


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_model_built_in_a_hook_is_frozen_before_its_optimizer_is_made(tmp_path, models, hook):
    module = Late(models, hook)
    trainer(tmp_path, AttentionOnlyFinetuning()).fit(module, batches())
    assert module.seen == 12
    start = values(instruct(models))
    assert {name for name, tensor in values(module.model).items() if not torch.equal(tensor, start[name])} == {
        name for name in start if "self_attn" in name
    }
    # The module is left with the hooks of its class.
    assert not {"setup", "configure_model"} & set(vars(module))


def test_modules_without_hooks_do_not_get_any(tmp_path):
    class Watch(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            self.overridden = is_overridden("configure_model", pl_module)

    watch = Watch()
    trainer(tmp_path, AttentionOnlyFinetuning(), watch, max_steps=1).fit(Module(tiny_llama()), batches())
    assert watch.overridden is False


def test_validating_and_testing_freeze_nothing(tmp_path):
    module = Recorded(tiny_llama())
    trainer(tmp_path, AttentionOnlyFinetuning()).validate(module, batches(1), verbose=False)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_running_statistics_stay_as_they_are(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
            self.stem, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, tokens):
            return self.head(self.encoder(self.stem(tokens)))

    module = Anything(Normed(), (torch.randn(2, 4, 8) + 1,))
    found = moved(module, AttentionOnlyFinetuning(heads=["model.head"]), directory=tmp_path)
    assert not module.model.stem.running_mean.any()
    assert module.model.head.running_mean.any()
    assert {name for name in found if "encoder" not in name} == {"head.weight", "head.bias"}


def fit(directory, models, *, order="after", resume=None, module=None, lata=None, epochs=2, **attention):
    """A fit with both callbacks; AttentionOnlyFinetuning before or after LATACallback."""
    lata = LATACallback(models / "instruction", output_dir=directory / "lata", base_weights="memory", table=False, **(lata or {}))
    callbacks = [lata, AttentionOnlyFinetuning(**attention)]
    kept = ModelCheckpoint(directory / "kept", save_top_k=-1, filename="{epoch}")
    module = module or Recorded(instruct(models))
    run = trainer(directory, *(callbacks if order == "after" else callbacks[::-1]), kept, enable_checkpointing=True, max_epochs=epochs)
    run.fit(module, batches(), ckpt_path=resume)
    return module, lata


@pytest.mark.parametrize("order", ["before", "after"])
def test_lata_callback_keeps_and_exports_only_what_is_trained(tmp_path, models, order):
    module, lata = fit(tmp_path, models, order=order)
    projections = {name for name in values(instruct(models)) if "self_attn" in name}
    state = torch.load(tmp_path / "kept/epoch=1.ckpt", weights_only=True)["callbacks"]
    assert set(next(value for key, value in state.items() if "LATACallback" in key)["fingerprint"]) == projections
    assert state["AttentionOnlyFinetuning"] == {
        "version": 1,
        "trainable": [f"model.{name}" for name in values(module.model) if "self_attn" in name],
    }
    expected = expected_vector(values(module.model), values(instruct(models)))
    assert same_bits(read_back(tmp_path / "lata/task_vector"), {name: expected[name] for name in projections})
    assert TaskVector.open(tmp_path / "lata/task_vector").unchanged == set(expected) - projections
    assert lata.run.tracker.start_weights.copied_bytes == 4 * sum(expected[name].numel() for name in projections)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, models, order):
    whole, _ = fit(tmp_path / "whole", models, order=order)
    fit(tmp_path / "broken", models, order=order, epochs=1)
    resumed, lata = fit(tmp_path / "broken", models, order=order, resume=tmp_path / "broken/kept/epoch=0.ckpt")
    assert same_bits(values(resumed.model), values(whole.model))
    one, other = (tmp_path / side / "lata" for side in ("whole", "broken"))
    assert (one / "history.jsonl").read_text() == (other / "history.jsonl").read_text()
    assert json.loads((one / "task_vector/task_vector.json").read_text()) == json.loads(
        (other / "task_vector/task_vector.json").read_text()
    )
    assert same_bits(read_back(one / "task_vector"), read_back(other / "task_vector"))
    assert lata.run.tracker.start_weights.copied_bytes == 4 * 2304


def test_a_run_that_trained_other_tensors_is_not_resumed(tmp_path):
    def run(epochs, resume=None, **options):
        kept = ModelCheckpoint(tmp_path, filename="kept")
        module = Module(tiny_llama(attention_bias=True))
        trainer(tmp_path, AttentionOnlyFinetuning(**options), kept, enable_checkpointing=True, max_epochs=epochs).fit(
            module, batches(), ckpt_path=resume
        )

    run(1)
    with pytest.raises(LataError, match=r"must train the same tensors as before.* 12: \['model.model.layers.0.self_attn.k_proj.bias'"):
        run(2, tmp_path / "kept.ckpt", train_bias=True)
    # What is wrong by itself is said first.
    with pytest.raises(LataError, match="no head 'head'"):
        run(2, tmp_path / "kept.ckpt", heads=["head"])


class Classifier(Recorded):
    """A vision model whose classifier is new."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **IMAGE)).train())

    def training_step(self, batch, batch_idx):
        return self.model(pixel_values=PIXELS + batch[0], labels=torch.tensor([0, 1])).loss


@pytest.mark.parametrize(("heads", "also"), [((), set()), (["model.classifier"], {"classifier.weight", "classifier.bias"})])
def test_a_head_is_frozen_or_trained_as_wanted(tmp_path, heads, also):
    _, _, projections = build("vit")
    assert moved(Classifier(), AttentionOnlyFinetuning(heads=heads), directory=tmp_path) == projections | also


def test_a_trained_head_is_no_part_of_the_task_vector(tmp_path):
    callbacks = [AttentionOnlyFinetuning(heads=["model.classifier"]), LATACallback(model="model.vit", output_dir=tmp_path / "lata")]
    module = Classifier()
    module.model.vit.save_pretrained(tmp_path / "start")
    moved(module, *callbacks, directory=tmp_path)
    module.model.vit.save_pretrained(tmp_path / "tuned")
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    expected = TaskVector.between(tmp_path / "start", tmp_path / "tuned")
    assert same_bits(dict(vector), dict(expected))
    assert not any("classifier" in name for name in vector)


@pytest.mark.parametrize("order", [1, -1])
def test_a_trained_head_inside_the_followed_model_is_refused(tmp_path, order):
    callbacks = [AttentionOnlyFinetuning(heads=["model.classifier"]), LATACallback(output_dir=tmp_path / "lata")]
    with pytest.raises(LataError, match=r"must not be part of the task vector.*2: \['classifier.bias', 'classifier.weight'\].*model=…"):
        moved(Classifier(), *callbacks[::order], directory=tmp_path)


class Two(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.other, self.nothing = model, nn.Linear(2, 2), nn.ReLU()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(4, 4), {}, "Module has no attention projections to train. Say where the model is with model="),
        (tiny_llama, {"heads": ["model.classifier"]}, r"has no head 'model.classifier'; its modules are \d+: \['model'"),
        (tiny_llama, {"heads": ["model.model"]}, "the head 'model.model' contains attention projections"),
        (
            lambda: tiny_llama(tie_word_embeddings=True),
            {"heads": ["model.lm_head"]},
            r"is tied to 1: \['model.model.embed_tokens.weight'\]",
        ),
        (lambda: Two(tiny_llama()), {"heads": ["model.nothing"]}, "the head 'model.nothing' has no parameters"),
        (tiny_llama, {"model": "encoder"}, "no submodule 'encoder'"),
    ],
    ids=["no attention", "no such head", "not a head", "tied head", "empty head", "no such model"],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path, make, options, message):
    module = Module(make())
    before = values(module)
    with pytest.raises(LataError, match=message):
        trainer(tmp_path, AttentionOnlyFinetuning(**options)).fit(module, batches())
    assert same_bits(values(module), before)


def test_quantised_projections_are_refused(tmp_path):
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(LataError, match=r"must be floating numbers.*1: \['model.layers.0.self_attn.q_proj.weight'\]"):
        trainer(tmp_path, AttentionOnlyFinetuning()).fit(Module(model), batches())


def test_adapters_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LataError, match="wrapped by peft; name the projections in the adapter's target_modules"):
        trainer(tmp_path, AttentionOnlyFinetuning()).fit(Module(model), batches())


def test_a_text_in_place_of_a_list_of_heads_is_refused():
    with pytest.raises(LataError, match=r"sequence of paths, got the text 'model.head'; write \['model.head'\]"):
        AttentionOnlyFinetuning(heads="model.head")


def test_the_state_of_a_newer_release_is_refused():
    with pytest.raises(LataError, match="is of version 2, this release reads up to 1"):
        AttentionOnlyFinetuning().load_state_dict({"version": 2, "trainable": []})


def test_a_checkpoint_of_another_run_can_be_tested(tmp_path, models):
    fit(tmp_path, models, epochs=1)
    callback = AttentionOnlyFinetuning(train_bias=True)
    run = trainer(tmp_path, callback)
    run.validate(Recorded(instruct(models)), batches(1), ckpt_path=tmp_path / "kept/epoch=0.ckpt", verbose=False)


def run_on_two(models, output, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output.mkdir(exist_ok=True)
    command = [
        sys.executable,
        Path(__file__).with_name("attention_run.py"),
        json.dumps({"models": str(models), "output": str(output), **options}),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def check_on_two(models, output):
    """Only projections differ from the start, in the weights the run saved by itself as in the vector."""
    tuned = torch.load(output / "tuned.ckpt", weights_only=True)["state_dict"]
    start = values(instruct(models))
    projections = {name for name in start if "self_attn" in name}
    assert {name for name in start if not torch.equal(start[name], tuned[name])} == projections
    vector = TaskVector.open(output / "lata/task_vector")
    assert vector.unchanged == set(start) - projections
    assert same_bits({name: vector[name] for name in projections}, {name: tuned[name] - start[name] for name in projections})


@pytest.fixture(scope="module")
def sharded(models, tmp_path_factory):
    """An uninterrupted run under FSDP2 of a model built before its trainer."""
    output = tmp_path_factory.mktemp("sharded")
    run_on_two(models, output, strategy="fsdp", built="init", order="before")
    return output


def test_two_sharding_processes_train_the_projections_alone(models, sharded):
    check_on_two(models, sharded)


@pytest.mark.parametrize(("built", "order"), [("init", "after"), ("configure_model", "before")])
def test_two_ddp_processes_train_the_projections_alone(tmp_path, models, built, order):
    run_on_two(models, tmp_path, strategy="ddp", built=built, order=order)
    check_on_two(models, tmp_path)


def test_a_resumed_sharded_run_of_a_model_built_late_ends_like_the_uninterrupted_one(tmp_path, models, sharded):
    options = {"strategy": "fsdp", "built": "configure_model", "order": "after"}
    run_on_two(models, tmp_path, **options, epochs=1)
    run_on_two(models, tmp_path, **options, resume=str(tmp_path / "kept/epoch=0.ckpt"))
    check_on_two(models, tmp_path)
    assert same_bits(read_back(tmp_path / "lata/task_vector"), read_back(sharded / "lata/task_vector"))
