"""Which layers of peft models are read as factors, which are merged by peft, and which are refused."""

import warnings

import peft
import pytest
import torch
from adapter_models import CONFIG, WEIGHTS, adapter, by_hand, change_config, close, noise_on, refused, wrapped
from architectures import loaded, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import read_back

from lata_lightning import TaskVector
from lata_lightning.errors import BaseMismatchError, LataError, SourceError

# peft asks a model for it, and transformers gives it another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.0\..*(q|up)_proj"},
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained copies": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal", "r": 4},
    "start other than zero": {"init_lora_weights": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plain_lora_is_read_from_its_directory_and_from_memory(tmp_path, kind):
    start, place, model = adapter(tmp_path, **KINDS[kind])
    expected = by_hand(start, place)
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    close(TaskVector.between(start, place).save(tmp_path / "vector"), expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_part_of_the_vector(tmp_path, bias):
    start, place, model = adapter(tmp_path, "bert", bias=bias, target_modules=["query"])
    expected = by_hand(start, place)
    biases = {name for name in expected if name.endswith(".bias")}
    assert len(biases) == (2 if bias == "lora_only" else sum(name.endswith("bias") for name in read_back(start)))
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]], ids=str)
def test_adapters_on_tied_embeddings_add_up_as_merging_adds_them(tmp_path, targets, ensured):
    start, place, model = adapter(tmp_path, tied=True, target_modules=targets, ensure_weight_tying=ensured)
    expected = by_hand(start, place)
    assert "model.embed_tokens.weight" in expected
    assert not set(expected) & {"lm_head.weight"}
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.double().merge_and_unload().save_pretrained(tmp_path / "peft")
    for name, tensor in read_back(tmp_path / "peft").items():
        torch.testing.assert_close(tensor, read_back(start)[name].double() + expected.get(name, 0), rtol=1e-6, atol=1e-6)


def test_a_trained_copy_of_a_tied_weight_has_to_stay_tied(tmp_path):
    start, place, model = adapter(tmp_path, tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    expected = by_hand_tied(start, place)
    assert "model.embed_tokens.weight" in expected
    close(TaskVector.between(start, place), expected)
    close(TaskVector.between(start, model), expected)
    for index, copies in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        _, place, model = adapter(tmp_path, modules_to_save=copies, adapter_name=f"untied {index}")
        for tuned in (place, model):
            with pytest.raises(LataError, match=r"2: \['lm_head.weight', 'model.embed_tokens.weight'\].*ensure_weight_tying"):
                TaskVector.between(start, tuned)


def by_hand_tied(start, place):
    """As by_hand, of a file that holds the one trained copy of a tied weight under both its names."""
    held = load_file(place / WEIGHTS)
    assert torch.equal(held.pop("base_model.model.lm_head.weight"), held["base_model.model.model.embed_tokens.weight"])
    place.with_name("once").mkdir()
    save_file(held, place.with_name("once") / WEIGHTS)
    (place.with_name("once") / CONFIG).write_text((place / CONFIG).read_text())
    return by_hand(start, place.with_name("once"))


def test_t5_with_an_adapter_on_its_shared_embedding_is_what_merging_gives(tmp_path):
    start, place, model = adapter(tmp_path, "t5", tied=True, target_modules=["shared", "q"])
    vectors = [TaskVector.between(start, tuned) for tuned in (place, model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.double().merge_and_unload().save_pretrained(tmp_path / "peft")
    for name, tensor in read_back(tmp_path / "peft").items():
        for vector in vectors:
            torch.testing.assert_close(vector[name].double(), tensor - read_back(start)[name].double(), rtol=1e-5, atol=1e-7)
    assert vectors[0].low_rank("shared.weight") is not None


@pytest.mark.parametrize("active", [["one", "two"], ["two"], ["one"]], ids=str)
def test_of_several_adapters_in_memory_the_active_ones_count(tmp_path, active):
    start, _, model = adapter(tmp_path, target_modules=["q_proj"], adapter_name="unused")
    for name, targets, rank in (("one", ["q_proj", "v_proj"], 2), ("two", ["q_proj", "up_proj"], 4)):
        model.add_adapter(name, peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    model.base_model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "both", selected_adapters=["one", "two"])
    expected = {}
    for name in active:
        for key, delta in by_hand(start, tmp_path / "both" / name).items():
            expected[key] = expected.get(key, 0) + delta
    vector = TaskVector.between(start, model)
    close(vector, expected)
    close(vector.save(tmp_path / "vector"), expected)
    assert vector.low_rank("model.layers.0.self_attn.q_proj.weight").rank == sum({"one": 2, "two": 4}[name] for name in active)


def test_a_copy_in_an_adapter_that_is_not_active_leaves_the_original_in_its_place(tmp_path):
    start, _, model = adapter(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    vector = TaskVector.between(start, model)
    assert set(vector) == set(read_back(start))
    assert not vector["lm_head.weight"].any()
    assert vector["model.layers.0.self_attn.v_proj.weight"].any()
    assert not vector["model.layers.0.self_attn.q_proj.weight"].any()


# To subtract the initial adapter, peft loads it next to the trained one.
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_saved_as_a_difference_to_its_initialisation_is_exact(tmp_path):
    start = tmp_path / "start"
    tiny_model("llama").save_pretrained(start)
    model = wrapped(loaded("llama", start), size=0.0, target_modules=["q_proj"], init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    noise_on(model, 8)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = {}
    for name, tensor in model.double().merge_and_unload().state_dict().items():
        expected[name] = tensor - read_back(start)[name].double()
    vector = TaskVector.between(start, tmp_path / "adapter")
    for name in vector:
        torch.testing.assert_close(vector[name].double(), expected[name], rtol=1e-5, atol=1e-6)


OTHER_KINDS = {
    "LoRA bias": (peft.LoraConfig, {"lora_bias": True, "target_modules": ["q_proj"]}, "cannot merge.*base layer has no bias"),
    "aLoRA": (peft.LoraConfig, {"alora_invocation_tokens": [1], "target_modules": ["q_proj"]}, "variant of LoRA that depends on its input"),
    "repeated layers": (peft.LoraConfig, {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}, "layer_replication"),
    "RoAd": (peft.RoadConfig, {"target_modules": ["q_proj"], "group_size": 4}, "type ROAD, which has not been compared"),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, "PROMPT_TUNING: it changes no weight"),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, "PREFIX_TUNING: it changes no weight"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, kind):
    make, options, message = OTHER_KINDS[kind]
    start, place, model = adapter(tmp_path, config=make, **options) if "target_modules" in options else prompted(tmp_path, make, options)
    refused(start, place, SourceError, message)
    refused(start, model, LataError, message)


def prompted(directory, make, options):
    tiny_model("llama").save_pretrained(directory / "start")
    model = peft.get_peft_model(loaded("llama", directory / "start"), make(**options))
    model.save_pretrained(directory / "adapter")
    return directory / "start", directory / "adapter", model


def test_adapters_on_fused_experts_are_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "start")
    model = wrapped(loaded("mixtral", tmp_path / "start"), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "start", tmp_path / "adapter", SourceError, "ParamWrapper")
    refused(tmp_path / "start", model, LataError, "ParamWrapper")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused_where_what_they_started_with_is_lost(tmp_path, init):
    start, place, model = adapter(tmp_path, init_lora_weights=init)
    refused(start, place, SourceError, f"initialised by {init}.*path_initial_model_for_weight_conversion")
    refused(start, model, BaseMismatchError, "changes the base weights.*path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_other_initialisations_of_that_kind_are_refused_by_their_config(tmp_path, init):
    start, place, _ = adapter(tmp_path)
    change_config(place, init_lora_weights=init)
    refused(start, place, SourceError, f"initialised by {init}")


def test_merged_adapters_are_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    model.merge_adapter()
    refused(start, model, LataError, "unmerge_adapter")


def test_a_base_weight_that_is_trained_as_well_is_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    refused(start, model, LataError, "trains the weight under it")


def test_adapters_without_a_peft_model_around_them_are_refused(tmp_path):
    start, _, _ = adapter(tmp_path)
    model = loaded("llama", start)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(start, model, LataError, "get_peft_model")
    mixed = peft.get_peft_model(loaded("llama", start), peft.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    refused(start, mixed, LataError, "get_peft_model")
