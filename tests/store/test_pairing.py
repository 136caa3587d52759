"""One set of names for saved directories, modules and Lightning checkpoints, whatever transformers calls the tensors on disk."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import same_bits, weights, write_checkpoint

from lata_lightning import TaskVector
from lata_lightning.errors import LayoutMismatchError
from lata_lightning.merging.merge import Term, merge
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import match, pair

# peft asks a model for it, and transformers gives it another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "GPTNeoXForCausalLM": transformers.GPTNeoXConfig(**SIZES, **TOKENS),
    "ViTForImageClassification": transformers.ViTConfig(**SIZES, image_size=8, patch_size=4),
    "SwinModel": transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4),
    "MixtralForCausalLM": transformers.MixtralConfig(**SIZES, **TOKENS, num_key_value_heads=1, num_local_experts=2),
    "LlamaForCausalLM": transformers.LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=True),
}


@pytest.fixture(params=MODELS, ids=str)
def models(request, tmp_path):
    """A start and a tuned model, and the directories they are saved in."""
    kind = getattr(transformers, request.param)
    found = []
    for name in ("start", "tuned"):
        model = kind(MODELS[request.param])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(tmp_path / name)
        found.append(model)
    return found, tmp_path


def from_files(directory):
    """Differences of the saved tensors, read with nothing but safetensors."""
    start, tuned = (load_file(directory / name / "model.safetensors") for name in ("start", "tuned"))
    return {name: tuned[name] - start[name] for name in start if start[name].is_floating_point()}


def equal(vector, expected):
    assert set(vector) == set(expected)
    assert all(torch.equal(vector[name], expected[name]) for name in expected)


def test_a_directory_and_a_module_meet_under_the_names_on_disk(models):
    (start, tuned), directory = models
    expected = from_files(directory)
    equal(TaskVector.between(directory / "start", directory / "tuned"), expected)
    equal(TaskVector.between(directory / "start", tuned), expected)
    equal(TaskVector.between(start, directory / "tuned"), expected)
    equal(TaskVector.between(start, tuned), expected)


def test_a_lightning_checkpoint_meets_a_directory_under_the_names_on_disk(models):
    (_, tuned), directory = models
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in tuned.state_dict().items()}}, directory / "tuned.ckpt")
    equal(TaskVector.between(directory / "start", directory / "tuned.ckpt"), from_files(directory))


def test_every_tensor_on_disk_has_its_block(models):
    _, directory = models
    vector = TaskVector.between(directory / "start", directory / "tuned")
    assert len(vector.layers.blocks) in (2, 3)
    outside = set(vector.layers.outside())
    assert all(name in outside or vector.layers.layer_of(name) in vector.layers.blocks for name in vector)


def test_other_modules_keep_their_names():
    tensors = {"weight": torch.ones(2, 2)}
    assert under_checkpoint_names(torch.nn.Linear(2, 2), tensors) == tensors


def test_tables_that_old_releases_saved_with_the_weights_are_left_out(tmp_path):
    model = transformers.LlamaForCausalLM(MODELS["LlamaForCausalLM"])
    for name in ("start", "tuned"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "start/model.safetensors"
    state = load_file(file)
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, metadata={"format": "pt"})
    assert set(TaskVector.between(tmp_path / "start", tmp_path / "tuned")) == set(state)


BARE = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **TOKENS)),
    "llama": (transformers.LlamaForCausalLM, MODELS["LlamaForCausalLM"]),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SIZES, vocab_size=40)),
    "vit": (transformers.ViTForImageClassification, MODELS["ViTForImageClassification"]),
    "resnet": (
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3),
    ),
}


def changed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(params=BARE, ids=str)
def with_and_without_head(request, tmp_path):
    """Directories of a start and a tuned model with a head, and the same of the model beneath; and the prefix that one has."""
    kind, config = BARE[request.param]
    torch.manual_seed(0)
    model = kind(config)
    for seed, label in enumerate(("start", "tuned")):
        changed(model, seed).save_pretrained(tmp_path / label)
        model.base_model.save_pretrained(tmp_path / f"{label}-bare")
        torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / f"{label}.ckpt")
    return tmp_path, model.base_model_prefix + "."


def differences(directory, prefix):
    """Differences of the tensors beneath the head, by the names of the model with it; parameters only."""
    return {name: value for name, value in from_files(directory).items() if name.startswith(prefix) and "running_" not in name}


@pytest.mark.parametrize("tuned", ["tuned", "tuned.ckpt"])
def test_the_model_beneath_a_head_meets_the_one_with_it(with_and_without_head, tuned):
    directory, prefix = with_and_without_head
    vector = TaskVector.between(directory / "start-bare", directory / tuned)
    expected = {name.removeprefix(prefix): value for name, value in differences(directory, prefix).items()}
    assert all(torch.equal(vector[name], value) for name, value in expected.items())
    assert not any(name.startswith(("classifier", "lm_head")) for name in vector)


def test_a_tuned_model_without_the_head_leaves_it_out(with_and_without_head):
    directory, prefix = with_and_without_head
    vector = TaskVector.between(directory / "start", directory / "tuned-bare")
    expected = differences(directory, prefix)
    assert all(torch.equal(vector[name], value) for name, value in expected.items())


def test_tensors_outside_the_prefix_are_named():
    inner = {f"layers.{number}.weight": torch.ones(2) for number in range(3)}
    whole = {f"model.{name}": tensor for name, tensor in inner.items()}
    found = match(open_source(inner), open_source(whole | {"head.weight": torch.ones(3)}))
    assert set(found.start.names) == set(found.tuned.names) == set(inner)
    assert found.left_out == ("head.weight",)


def test_tensors_outside_the_prefix_on_both_sides_are_refused():
    inner = {f"layers.{number}.weight": torch.ones(2) for number in range(3)}
    one = {f"model.{name}": tensor for name, tensor in inner.items()} | {"loss.weight": torch.ones(2)}
    other = {f"transformer.{name}": tensor for name, tensor in inner.items()} | {"head.weight": torch.ones(3)}
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 2: \['head.weight', 'loss.weight'\].*--leave-out '\^\(head"):
        match(open_source(one), open_source(other))
    found = match(open_source(one), open_source(other), LeaveOut(["^(head|loss)"]))
    assert len(found.start.names) == 3


@pytest.mark.parametrize("marker", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_markers_of_wrappers_are_no_part_of_names_in_files(tmp_path, marker):
    model = changed(transformers.LlamaForCausalLM(MODELS["LlamaForCausalLM"]), 0)
    model.save_pretrained(tmp_path / "start")
    changed(model, 1).save_pretrained(tmp_path / "tuned")
    expected = from_files(tmp_path)
    file = tmp_path / "tuned/model.safetensors"
    renamed = {name.replace("layers.1.", f"layers.1.{marker}."): tensor for name, tensor in load_file(file).items()}
    save_file({f"module.{name}": tensor for name, tensor in renamed.items()}, file, metadata={"format": "pt"})
    equal(TaskVector.between(tmp_path / "start", tmp_path / "tuned"), expected)
    assert set(TaskVector.between(tmp_path / "tuned", tmp_path / "start").layers.blocks) >= {"module.model.layers.1"}


def test_layer_norms_of_old_releases_meet_those_of_today(tmp_path):
    model = changed(transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=40)), 0)
    model.save_pretrained(tmp_path / "start")
    changed(model, 1).save_pretrained(tmp_path / "tuned")
    expected = from_files(tmp_path)
    file = tmp_path / "start/model.safetensors"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in load_file(file).items()}  # fmt: skip
    save_file(old, file, metadata={"format": "pt"})
    equal(TaskVector.between(tmp_path / "tuned", tmp_path / "start"), {name: -value for name, value in expected.items()})
    assert any(name.endswith("LayerNorm.gamma") for name in TaskVector.between(tmp_path / "start", tmp_path / "tuned"))


def test_heads_of_other_sizes_come_with_the_pattern_that_leaves_them_out(tmp_path):
    for count, label in ((3, "start"), (5, "tuned")):
        config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=count)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / label)
    sides = open_source(tmp_path / "start"), open_source(tmp_path / "tuned")
    with pytest.raises(LayoutMismatchError, match=r"leave them out: --leave-out '\^classifier\\\.' \(leave_out"):
        pair(*sides)
    start, _ = pair(*sides, LeaveOut([r"^classifier\."]))
    assert not any(name.startswith("classifier") for name in start.names)


@pytest.mark.parametrize("stored", [("shared.weight",), ("shared.weight", "lm_head.weight", "decoder.embed_tokens.weight")])
def test_ties_follow_the_class_where_the_config_says_nothing(tmp_path, stored):
    settings = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = changed(transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)), 0)
    model.save_pretrained(tmp_path / "start")
    changed(model, 1).save_pretrained(tmp_path / "tuned")
    expected = from_files(tmp_path)
    for label in ("start", "tuned"):
        config = json.loads((tmp_path / label / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (tmp_path / label / "config.json").write_text(json.dumps(config))
    file = tmp_path / "tuned/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors["shared.weight"].clone() for name in stored}, file, metadata={"format": "pt"})
    equal(TaskVector.between(tmp_path / "start", tmp_path / "tuned"), expected)
    equal(TaskVector.between(tmp_path / "tuned", tmp_path / "start"), {name: -value for name, value in expected.items()})
    # A head that was trained apart is no copy.
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        TaskVector.between(tmp_path / "start", tmp_path / "tuned")


def test_lora_on_a_model_with_a_head_fits_the_bare_start(with_and_without_head, request):
    from peft import LoraConfig, get_peft_model

    directory, prefix = with_and_without_head
    kind = BARE[request.node.callspec.params["with_and_without_head"]][0]
    if kind is transformers.ResNetForImageClassification:
        pytest.skip("its convolutions are adapted as any others")
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj"], "bert": ["query"], "vit": ["q_proj"]}[
        request.node.callspec.params["with_and_without_head"]
    ]
    model = get_peft_model(
        kind.from_pretrained(directory / "start-bare"), LoraConfig(target_modules=targets, r=2, fan_in_fan_out="c_attn" in targets)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(directory / "adapter")
    before = load_file(directory / "start-bare/model.safetensors")
    vector = TaskVector.between(directory / "start-bare", directory / "adapter")
    model.merge_and_unload().base_model.save_pretrained(directory / "merged")
    after = load_file(directory / "merged/model.safetensors")
    assert any(vector.low_rank(name) is not None for name in vector)
    for name in vector:
        plain = name.removeprefix(prefix)
        torch.testing.assert_close(vector[name], after[plain] - before[plain], rtol=0, atol=1e-5)


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
PASSED_OVER = {
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    "qwen3-next": (
        lambda: transformers.Qwen3NextForCausalLM(
            transformers.Qwen3NextConfig(
                **SIZES, **TOKENS, num_key_value_heads=1, head_dim=8, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
                linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
            )
        ),
        "mtp.layers.0.self_attn.q_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PASSED_OVER)
@pytest.mark.parametrize("side", ["start", "tuned"])
def test_what_transformers_passes_over_when_it_loads_a_checkpoint_needs_no_partner(tmp_path, kind, side):
    build, extra = PASSED_OVER[kind]
    model = build()
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    expected = from_files(tmp_path)
    stored = load_file(tmp_path / side / "model.safetensors")
    save_file({**stored, extra: torch.ones(4, 2)}, tmp_path / side / "model.safetensors", {"format": "pt"})
    vector = TaskVector.between(tmp_path / "start", tmp_path / "tuned")
    equal(vector, expected)
    merge(tmp_path / "start", [Term(vector)], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert (extra in merged) == (side == "start")
    stored = load_file(tmp_path / "start" / "model.safetensors")
    assert all(torch.equal(merged[name], stored[name] + expected[name] if name in expected else stored[name]) for name in stored)


def test_a_bare_vision_language_model_meets_the_one_with_a_head(tmp_path):
    text = {**SIZES, "vocab_size": 160, "num_key_value_heads": 1, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=150, video_token_id=151)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    for name in ("start", "tuned"):
        model.save_pretrained(tmp_path / name)
        model.model.save_pretrained(tmp_path / f"{name}-bare")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    expected = from_files(tmp_path)
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\].*--leave-out '\^lm_head"):
        TaskVector.between(tmp_path / "start", tmp_path / "tuned-bare")
    vector = TaskVector.between(tmp_path / "start", tmp_path / "tuned-bare", leave_out=[r"^lm_head\."])
    equal(vector, {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"})
    assert len(TaskVector.between(tmp_path / "start-bare", tmp_path / "tuned", leave_out=[r"^lm_head\."])) == len(vector)


def contents(source):
    return {name: source.read(name) for name in source.names}


@pytest.mark.parametrize("side", ["start", "tuned"])
def test_the_module_prefix_of_either_side_is_taken_off(side):
    prefixed = {"student." + name: tensor for name, tensor in weights().items()} | {"loss.weight": torch.ones(3)}
    sides = [open_source(prefixed), open_source(weights())]
    start, tuned = pair(*(sides if side == "start" else reversed(sides)))
    assert set(start.names) == set(tuned.names) == set(weights())
    assert same_bits(contents(start), contents(tuned))


def test_two_checkpoints_with_one_prefix_pair_under_it(tmp_path):
    sides = [open_source(write_checkpoint(tmp_path / f"{name}.ckpt", weights())) for name in "ab"]
    start, tuned = pair(*sides)
    assert start.names == tuned.names == tuple("model." + name for name in weights())


def test_a_checkpoint_that_holds_the_model_twice_is_refused_rather_than_guessed():
    both = {prefix + name: tensor for prefix in ("teacher.", "student.") for name, tensor in weights().items()}
    with pytest.raises(
        LayoutMismatchError, match=r"hold the model once; .* under each of 2: \['student.', 'teacher.'\]. Say which to take: --model NAME"
    ):
        pair(open_source(weights()), open_source(both))
