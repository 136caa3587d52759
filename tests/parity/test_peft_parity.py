"""Merges of LoRA adapters beside those of peft, both measured against float64 sums formed from the files of the adapters."""

import json
from functools import cache
from math import cos, exp, sin

import peft
import pytest
import torch
from architectures import ARCHITECTURES, both_precisions, loaded, outputs_of
from exact_sums import Exact, assert_as_near_as_can_be, assert_no_further, exact_sum
from safetensors.torch import load_file
from tiny_models import read_back

from lata_lightning import TaskVector, Term, align, forget, merge

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning", "FutureWarning")]
TARGETS = {
    "llama": ["q_proj", "up_proj"],
    "gemma2": ["v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "bert": ["query", "value"],
    "bert_classifier": ["query", "value"],
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "fc1"],
    "vit": ["q_proj", "v_proj", "projection"],
    "clip_vision": ["q_proj", "fc2"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["k_proj", "o_proj"],
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
some_architectures = pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "clip_vision", "mixtral"])


def save_adapter(name, models, directory, seed, *, targets=(), **options):
    """An adapter on start with factors that are all noise, saved by peft."""
    model = loaded(name, models["start"])
    settings = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": name == "gpt2", "target_modules": [*TARGETS[name], *targets], **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def two_adapters(tmp_path_factory, family):
    """A function that gives two adapters on start that differ in rank and scaling, each with a weight, made once."""

    @cache
    def saved(name, dtype):
        models, directory = family(name, False, dtype), tmp_path_factory.mktemp(f"adapters-{name}")
        one = save_adapter(name, models, directory / "one", 1)
        two = save_adapter(name, models, directory / "two", 2, r=4, lora_alpha=3, use_rslora=True)
        return (one, exp(-1)), (two, -cos(0.6))

    return saved


def wrapped_twice(name, models, adapters, *, double=False):
    """Start with two adapters by the names one and two, as peft loads them."""
    (one, _), (two, _) = adapters
    base = loaded(name, models["start"])
    model = peft.PeftModel.from_pretrained(base.double() if double else base, one, adapter_name="one", autocast_adapter_dtype=not double)
    model.load_adapter(two, "two", autocast_adapter_dtype=not double)
    return model.double() if double else model


def concatenated(name, models, adapters, **options):
    """The weighted sum of two adapters as a third, which peft calls the exact one."""
    model = wrapped_twice(name, models, adapters, **options)
    model.add_weighted_adapter(["one", "two"], [weight for _, weight in adapters], "both", combination_type="cat")
    model.set_adapter("both")
    return model


def merged_by_peft(model, output, **options):
    model.merge_and_unload(**options).save_pretrained(output)
    return read_back(output)


def exact_adapted(name, models, adapters, output, weight_of=lambda path: 1.0):
    """Start plus weighted adapters, summed in float64 under the names of the modules; transformers gives them those of the checkpoint.

    Args:
        name, models: An architecture and its directories.
        adapters: Directory and weight of each.
        output: Where transformers may save the sum.
        weight_of: A further weight by the path of a module.
    """
    model = loaded(name, models["start"]).double()
    state = model.state_dict()
    for directory, weight in adapters:
        config, held = json.loads((directory / "adapter_config.json").read_text()), load_file(directory / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1.0)
        for key, right in held.items():
            path, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
            if not found:
                path, found, _ = path.partition(".lora_embedding_A")
            if found:
                added = held[key.replace("_A", "_B")].double().flatten(1) @ right.double().flatten(1)
                turned = config["fan_in_fan_out"] or "embedding" in found
                target = state[f"{path}.weight"]
                target += weight * weight_of(path) * scale * (added.T if turned else added).reshape(target.shape)
    model.save_pretrained(output)
    return {key: Exact(tensor, torch.zeros_like(tensor)) for key, tensor in read_back(output).items()}


@every_architecture
@both_precisions
def test_a_merged_adapter_is_no_further_from_the_exact_sum_than_merge_and_unload(tmp_path, family, two_adapters, name, dtype):
    models, ((adapter, _), _) = family(name, False, dtype), two_adapters(name, dtype)
    vector = TaskVector.between(models["start"], adapter)
    assert 0 < sum(vector.low_rank(key) is not None for key in vector) == len(vector) - len(vector.unchanged)
    ours = merge(models["start"], [Term(vector)], tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(loaded(name, models["start"]), adapter)
    theirs = merged_by_peft(wrapped, tmp_path / "theirs")
    exact = exact_adapted(name, models, [(adapter, 1.0)], tmp_path / "exact")
    assert_as_near_as_can_be(read_back(ours), exact, dtype)
    assert_no_further(read_back(ours), theirs, exact)
    model, report = loaded(name, ours, output_loading_info=True)
    assert not any(report.values()), report
    unmerged = peft.PeftModel.from_pretrained(loaded(name, models["start"]).float(), adapter)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs_of(name, model), outputs_of(name, unmerged), rtol=0, atol=tolerance)


@every_architecture
@both_precisions
def test_several_adapters_are_no_further_from_the_exact_sum_than_their_concatenation_by_peft(tmp_path, family, two_adapters, name, dtype):
    models, adapters = family(name, False, dtype), two_adapters(name, dtype)
    terms = [Term(TaskVector.between(models["start"], directory), weight) for directory, weight in adapters]
    ours = read_back(merge(models["start"], terms, tmp_path / "ours"))
    exact = exact_adapted(name, models, adapters, tmp_path / "exact")
    assert_as_near_as_can_be(ours, exact, dtype)
    both = concatenated(name, models, adapters)
    both.save_pretrained(tmp_path / "saved", selected_adapters=["both"])
    assert_no_further(ours, merged_by_peft(both, tmp_path / "theirs"), exact)
    if dtype == torch.float32:
        # What peft saves as one adapter is the same sum, but for the rounding of its factors (which takes them to half a precision beside such weights).
        one_vector, start = TaskVector.between(models["start"], tmp_path / "saved/both"), read_back(models["start"])
        for key in one_vector:
            torch.testing.assert_close(one_vector[key].double(), exact[key].values - start[key].double(), rtol=1e-5, atol=1e-6)


@every_architecture
@both_precisions
def test_dense_and_low_rank_vectors_make_the_sum_that_peft_makes_in_float64(tmp_path, family, two_adapters, name, dtype):
    models, adapters = family(name, False, dtype), two_adapters(name, dtype)
    terms = [Term(TaskVector.between(models["start"], directory), weight) for directory, weight in adapters]
    dense = Term(TaskVector.between(models["start"], models["tuned-1"]), sin(0.8))
    ours = read_back(merge(models["start"], [terms[0], dense, terms[1]], tmp_path / "ours"))
    shifted = exact_sum(models["start"], (models["start"], models["tuned-1"], sin(0.8)))
    adapted = merged_by_peft(concatenated(name, models, adapters, double=True), tmp_path / "theirs")
    start = read_back(models["start"])
    exact = {key: Exact(shifted[key].values + (adapted[key] - start[key].double()), shifted[key].unheld) for key in shifted}
    assert_as_near_as_can_be(ours, exact, dtype)


@every_architecture
@both_precisions
def test_forgetting_an_adapter_is_no_further_from_the_exact_sum_than_a_negative_weight_in_peft(tmp_path, family, two_adapters, name, dtype):
    models, (_, (adapter, weight)) = family(name, False, dtype), two_adapters(name, dtype)
    ours = read_back(forget(models["start"], Term(TaskVector.between(models["start"], adapter), -weight), tmp_path / "ours"))
    exact = exact_adapted(name, models, [(adapter, weight)], tmp_path / "exact")
    assert_as_near_as_can_be(ours, exact, dtype)
    model = peft.PeftModel.from_pretrained(loaded(name, models["start"]), adapter, adapter_name="two")
    model.add_weighted_adapter(["two"], [weight], "negated", combination_type="cat")
    model.set_adapter("negated")
    assert_no_further(ours, merged_by_peft(model, tmp_path / "theirs"), exact)


@some_architectures
@both_precisions
def test_adapters_merged_one_after_the_other_by_peft_are_no_nearer_than_one_sum(tmp_path, family, two_adapters, name, dtype):
    models = family(name, False, dtype)
    adapters = [(directory, 1.0) for directory, _ in two_adapters(name, dtype)]
    terms = [Term(TaskVector.between(models["start"], directory)) for directory, _ in adapters]
    ours = read_back(merge(models["start"], terms, tmp_path / "ours"))
    exact = exact_adapted(name, models, adapters, tmp_path / "exact")
    assert_as_near_as_can_be(ours, exact, dtype)
    theirs = merged_by_peft(wrapped_twice(name, models, adapters), tmp_path / "theirs", adapter_names=["one", "two"])
    assert_no_further(ours, theirs, exact)


@some_architectures
@both_precisions
def test_layer_coefficients_do_what_scaling_every_layer_of_the_adapter_by_hand_does(tmp_path, family, two_adapters, name, dtype):
    models, (_, (adapter, _)) = family(name, False, dtype), two_adapters(name, dtype)
    vector = TaskVector.between(models["start"], adapter)
    instruction = TaskVector.between(models["base"], models["start"], kind="instruction")
    vector = vector.weighted(align(vector, instruction), "linear")
    weights = vector.manifest.coefficients
    assert len(set(weights.values())) == len(vector.layers.blocks)

    def weight_of(path):
        return next(weight for block, weight in weights.items() if path.startswith(f"{block}."))

    ours = read_back(merge(models["start"], [Term(vector, sin(0.8))], tmp_path / "ours"))
    exact = exact_adapted(name, models, [(adapter, sin(0.8))], tmp_path / "exact", weight_of)
    assert_as_near_as_can_be(ours, exact, dtype)
    model = peft.PeftModel.from_pretrained(loaded(name, models["start"]), adapter)
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(sin(0.8) * weight_of(path))
    assert_no_further(ours, merged_by_peft(model, tmp_path / "theirs"), exact)


@pytest.mark.parametrize(("name", "embedding"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("mixtral", "embed_tokens")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@both_precisions
def test_adapted_embeddings_are_no_further_from_the_exact_sum_and_tied_ones_stay_tied(tmp_path, family, name, embedding, tied, dtype):
    models = family(name, tied, dtype)
    adapter = save_adapter(name, models, tmp_path / "adapter", 5, targets=[embedding])
    ours = merge(models["start"], [Term(TaskVector.between(models["start"], adapter))], tmp_path / "ours")
    exact = exact_adapted(name, models, [(adapter, 1.0)], tmp_path / "exact")
    assert_as_near_as_can_be(read_back(ours), exact, dtype)
    theirs = merged_by_peft(peft.PeftModel.from_pretrained(loaded(name, models["start"]), adapter), tmp_path / "theirs")
    assert_no_further(read_back(ours), theirs, exact)
    model = loaded(name, ours)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
