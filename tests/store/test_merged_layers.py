"""Adapters that are no plain LoRA, against what peft's own ``merge_and_unload`` makes of the whole model in float64."""

import copy
import json
import warnings

import peft
import pytest
import torch
from adapter_models import CONFIG, adapter, change_config, noise_on, refused
from architectures import loaded, tiny_model
from tiny_models import read_back
from torch import nn

from lata_lightning import TaskVector, Term, merge
from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.store.merged_layers import KINDS, merged_parameters
from lata_lightning.store.opening import open_source

# peft asks a model for it, and transformers gives it another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
# Name of the kind in peft, configuration and its settings.
CASES = {
    "DoRA": ("LORA", peft.LoraConfig, {"use_dora": True, **TARGETS}),
    "DoRA on an embedding": ("LORA", peft.LoraConfig, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA with rsLoRA": ("LORA", peft.LoraConfig, {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 7}, **TARGETS}),
    "LoRA with trained tokens": ("LORA", peft.LoraConfig, {"trainable_token_indices": [1, 5], **TARGETS}),
    "LoHa": ("LOHA", peft.LoHaConfig, {"r": 2, "alpha": 3, **TARGETS}),
    "LoKr": ("LOKR", peft.LoKrConfig, {"r": 2, "alpha": 3, **TARGETS}),
    "LoKr of two factored sides": ("LOKR", peft.LoKrConfig, {"r": 2, "decompose_both": True, "decompose_factor": 4, **TARGETS}),
    "GraLoRA": ("GRALORA", peft.GraloraConfig, {"r": 4, "gralora_k": 2, **TARGETS}),
    "HiRA": ("HIRA", peft.HiraConfig, {"r": 2, **TARGETS}),
    "IA3": ("IA3", peft.IA3Config, {"feedforward_modules": ["down_proj"], **TARGETS}),
    "AdaLoRA": ("ADALORA", peft.AdaLoraConfig, {"total_step": 10, **TARGETS}),
    "OFT": ("OFT", peft.OFTConfig, {"r": 0, "oft_block_size": 4, **TARGETS}),
    "BOFT": ("BOFT", peft.BOFTConfig, {"boft_block_size": 4, **TARGETS}),
    "VeRA": ("VERA", peft.VeraConfig, {"r": 2, "target_modules": ["q_proj"]}),
    "VeRA without its projections": ("VERA", peft.VeraConfig, {"r": 2, "save_projection": False, "target_modules": ["q_proj"]}),
    "FourierFT": ("FOURIERFT", peft.FourierFTConfig, {"n_frequency": 5, **TARGETS}),
    "HRA": ("HRA", peft.HRAConfig, {"r": 2, **TARGETS}),
    "MiSS": ("MISS", peft.MissConfig, {"r": 2, **TARGETS}),
    "C3A": ("C3A", peft.C3AConfig, {"block_size": 8, **TARGETS}),
    "VB-LoRA": ("VBLORA", peft.VBLoRAConfig, {"r": 2, "num_vectors": 20, "vector_length": 4, "topk": 2, **TARGETS}),
    "layer norm tuning": ("LN_TUNING", peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "trained tokens": ("TRAINABLE_TOKENS", peft.TrainableTokensConfig, {"token_indices": [1, 5]}),
}  # fmt: skip


def by_peft(start, model):
    """What merging changes, in float64, by the names of the start's files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return {name: merged[name] - weight.double() for name, weight in read_back(start).items()}


def close(vector, expected):
    """Rounded once to float32, and no tensor changed that peft leaves alone."""
    assert set(vector) == set(expected)
    assert any(delta.any() for delta in expected.values())
    for name, delta in expected.items():
        torch.testing.assert_close(vector[name].double(), delta, rtol=2e-7, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def test_every_kind_that_is_read_is_compared_here():
    assert {kind for kind, _, _ in CASES.values()} == KINDS


@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_changes_what_merging_by_peft_changes(tmp_path, kind):
    _, config, options = CASES[kind]
    start, place, model = adapter(tmp_path, config=config, **options)
    expected = by_peft(start, model)
    vector = TaskVector.between(start, place)
    close(vector, expected)
    close(TaskVector.between(start, model), expected)
    assert {name for name in vector if not expected[name].any()} == vector.unchanged
    close(vector.save(tmp_path / "vector"), expected)


@pytest.mark.parametrize(("name", "kind", "targets"), [
    ("bert", "DoRA", ["query", "dense"]), ("bert", "IA3", ["key", "value"]), ("gpt2", "DoRA", ["c_attn"]), ("gpt2", "IA3", ["c_attn"]),
    ("vit", "LoHa", ["q_proj", "projection"]), ("clip_vision", "DoRA", ["q_proj", "patch_embedding"]), ("mixtral", "LoKr", ["q_proj"]),
])  # fmt: skip
def test_biases_transposed_weights_and_convolutions_follow_peft_too(tmp_path, name, kind, targets):
    _, config, options = CASES[kind]
    more = {"feedforward_modules": []} if kind == "IA3" else {}
    more |= {"fan_in_fan_out": True} if name == "gpt2" else {}
    start, place, model = adapter(tmp_path, name, config=config, **{**options, "target_modules": targets, **more})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(model).double().merge_and_unload().save_pretrained(tmp_path / "peft")
    weights, merged = read_back(start), read_back(tmp_path / "peft")
    expected = {entry: merged[entry].double() - weight.double() for entry, weight in weights.items()}
    vector = TaskVector.between(start, place)
    close(vector, expected)
    assert any(entry.endswith("bias") for entry in vector if vector[entry].any()) == (kind == "IA3")


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "IA3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_model_is_the_exact_sum_but_for_the_rounding_of_its_parts(tmp_path, kind, dtype):
    _, config, options = CASES[kind]
    start, place, model = adapter(tmp_path, config=config, dtype=dtype, **options)
    changes = by_peft(start, model)
    exact = {name: weight.double() + changes[name] for name, weight in read_back(start).items()}
    ours, whole = read_back(merge(start, [Term(TaskVector.between(start, place))], tmp_path / "merged")), open_source(place)
    for name, values in exact.items():
        once = values.abs() * torch.finfo(dtype).eps / 2
        # A vector is float32, and a sum of it is rounded again.
        for found, allowed in ((whole.read(name), once), (ours[name], once + changes[name].abs() * torch.finfo(torch.float32).eps)):
            assert found.dtype == dtype
            assert ((found.double() - values).abs() <= allowed + 1e-12).all(), name


def test_from_one_adapter_to_another_of_its_kind_lies_their_exact_difference(tmp_path):
    start, first, one = adapter(tmp_path, use_dora=True, **TARGETS)
    _, second, two = adapter(tmp_path, adapter_name="second", seed=40, config=peft.LoHaConfig, target_modules=["q_proj"], r=2)
    expected = {name: by_peft(start, two)[name] - delta for name, delta in by_peft(start, one).items()}
    close(TaskVector.between(first, second), expected)


def test_of_tied_weights_what_both_layers_add_counts(tmp_path):
    start, place, model = adapter(tmp_path, tied=True, config=peft.LoHaConfig, target_modules=["lm_head"], r=2)
    vector = TaskVector.between(start, place)
    close(vector, by_peft(start, model))
    assert set(vector) - vector.unchanged == {"model.embed_tokens.weight"}


def test_the_commands_take_adapters_of_every_kind(tmp_path, capsys):
    start, place, model = adapter(tmp_path, use_dora=True, **TARGETS)
    assert main(["extract", str(start), str(place), "--output", str(tmp_path / "vector")]) == 0
    close(TaskVector.open(tmp_path / "vector"), by_peft(start, model))
    assert main(["inspect", str(place)]) == 0
    capsys.readouterr()


def test_opening_an_adapter_draws_no_random_number(tmp_path):
    start, place, _ = adapter(tmp_path, config=peft.OFTConfig, r=0, oft_block_size=4, **TARGETS)
    torch.manual_seed(1)
    TaskVector.between(start, place)
    found = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(3))


def test_a_model_that_is_merged_after_it_was_opened_is_refused(tmp_path):
    start, _, model = adapter(tmp_path, use_dora=True, **TARGETS)
    vector = TaskVector.between(start, model)
    model.merge_adapter()
    with pytest.raises(LataError, match="merged after it was opened; call unmerge_adapter"):
        _ = vector["model.layers.0.self_attn.q_proj.weight"]


def test_an_adapter_file_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    start, place, _ = adapter(tmp_path, use_dora=True, **TARGETS)
    path = place / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "magnitude" not in name}, path)
    refused(start, place, CorruptFileError, r"lacks tensors that its config asks for, 4: .*lora_magnitude_vector")


def test_a_kind_that_this_release_of_peft_does_not_know_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, peft_type="LATER")
    refused(start, place, SourceError, "type LATER, which this release of peft does not know")


def test_a_quantised_weight_whose_change_depends_on_it_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "start")
    model = peft.get_peft_model(loaded("llama", tmp_path / "start"), peft.LoraConfig(r=2, use_dora=True, **TARGETS))
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.base_layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    refused(tmp_path / "start", model, LataError, "depends on the weights, and these are quantised.*lata extract START ADAPTER")


def test_a_layer_is_not_changed_by_computing_what_it_merges_to(tmp_path):
    _, _, model = adapter(tmp_path, use_dora=True, **TARGETS)
    noise_on(model, 3)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = layer.get_base_layer().weight
    merged = merged_parameters(layer, {"weight": weight.detach().half()})
    assert merged["weight"].dtype == torch.float64
    assert layer.get_base_layer().weight is weight
    assert not layer.merged
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["use_dora"]
