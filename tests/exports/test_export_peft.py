import json

import peft
import pytest
import torch
from adapting import adapted, reference, save_adapter
from architectures import every_architecture, loaded, outputs_of, save_family
from passed_warnings import GRADIENT_CHECKPOINTING, PEFT_ORIENTATION, PEFT_SAVES_EMBEDDINGS, PEFT_TIED_LAYER, PEFT_UNTIES
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import leftovers, write_checkpoint, write_model
from tiny_models import llama as tiny_llama
from transformers import CLIPConfig, CLIPModel

from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, OutputError
from lata_lightning.exports import export_to
from lata_lightning.exports.peft import export_peft
from lata_lightning.merging.merge import Term
from lata_lightning.vectors.task_vector import TaskVector

pytestmark = [GRADIENT_CHECKPOINTING, PEFT_ORIENTATION, PEFT_SAVES_EMBEDDINGS, PEFT_TIED_LAYER, PEFT_UNTIES]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def between(models, tuned="tuned-1"):
    return TaskVector.between(str(models["start"]), str(models[tuned]))


def on(name, start, adapter):
    return PeftModel.from_pretrained(loaded(name, start), adapter)


def read(adapter):
    return load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())


def record(adapter):
    return json.loads((adapter / "reconstruction.json").read_text())


def close(found, expected, dtype=torch.float32):
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 2**-10)}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol)


@every_architecture
def test_an_adapter_of_full_rank_is_the_merged_model_in_forward_and_in_its_weights(tmp_path, name, tied):
    models = save_family(tmp_path, name, tied=tied)
    vector = between(models)
    export_peft([Term(vector, -0.5)], tmp_path / "adapter", rank=64)
    wanted = loaded(name, reference(tmp_path / "wanted", models["start"], [(models["tuned-1"], -0.5)]))
    model = on(name, models["start"], tmp_path / "adapter")
    torch.testing.assert_close(outputs_of(name, model), outputs_of(name, wanted), rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload().state_dict()
    assert set(merged) == set(wanted.state_dict())
    for key, tensor in wanted.state_dict().items():
        close(merged[key], tensor)
    assert record(tmp_path / "adapter")["all"] < 1e-6


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("t5", True), ("mixtral", False)])
def test_an_adapter_for_a_bfloat16_model_gives_the_merged_weights_up_to_one_rounding(tmp_path, name, tied):
    models = save_family(tmp_path, name, tied=tied, dtype=torch.bfloat16)
    export_peft([Term(between(models), 0.5)], tmp_path / "adapter", rank=64)
    wanted = loaded(name, reference(tmp_path / "wanted", models["start"], [(models["tuned-1"], 0.5)])).state_dict()
    merged = on(name, models["start"], tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in wanted.items():
        assert merged[key].dtype == torch.bfloat16
        close(merged[key], tensor, torch.bfloat16)


def test_the_record_tells_what_a_truncated_adapter_adds(tmp_path, llama):
    export_peft([Term(between(llama), 0.7)], tmp_path / "adapter", rank=3)
    start, tuned = (load_file(llama[side] / "model.safetensors") for side in ("start", "tuned-1"))
    tensors, config = read(tmp_path / "adapter")
    assert config["r"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    told = record(tmp_path / "adapter")
    errors, norms = {}, {}
    for name in start:
        wanted = 0.7 * (tuned[name] - start[name]).double()
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in tensors:
            # As tools that know neither patterns nor whole modules compute it.
            added = (
                config["lora_alpha"] / config["r"] * tensors[f"{path}.lora_B.weight"].double() @ tensors[f"{path}.lora_A.weight"].double()
            )
        elif f"{path}.lora_embedding_A" in tensors:
            added = (tensors[f"{path}.lora_embedding_B"].double() @ tensors[f"{path}.lora_embedding_A"].double()).T
        else:
            added = tensors[f"{path}.weight"].double() - start[name].double()
        errors[name], norms[name] = (wanted - added).square().sum().item(), wanted.square().sum().item()
        assert told["tensors"][name]["error"] == pytest.approx((errors[name] / norms[name]) ** 0.5, rel=1e-9)
    block = [name for name in start if name.startswith("model.layers.1.")]
    expected = (sum(errors[name] for name in block) / sum(norms[name] for name in block)) ** 0.5
    assert told["layers"]["model.layers.1"] == pytest.approx(expected)
    assert told["all"] == pytest.approx((sum(errors.values()) / sum(norms.values())) ** 0.5)
    assert set(told["outside"]) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| all | {told['all']:.3g} |" in card
    assert f"- {json.dumps(str(llama['start']))}" in card
    assert "library_name: peft" in card


def test_an_energy_gives_each_matrix_its_own_rank_and_one_scale_to_all(tmp_path, llama):
    export_peft([Term(between(llama))], tmp_path / "adapter", energy=0.7)
    told, (tensors, config) = record(tmp_path / "adapter"), read(tmp_path / "adapter")
    ranks = {name: entry["rank"] for name, entry in told["tensors"].items() if entry["held"] == "cut"}
    assert len(set(ranks.values())) > 1
    assert all(told["tensors"][name]["error"] ** 2 <= 0.3 + 1e-6 for name in ranks)
    assert config["r"] == max(ranks.values())
    model = on("llama", llama["start"], tmp_path / "adapter")
    layers = {key: module for key, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert {key: module.r["default"] for key, module in layers.items()} == {
        name.removesuffix(".weight"): rank for name, rank in ranks.items()
    }
    assert {module.scaling["default"] for module in layers.values()} == {1.0}
    assert len(tensors) == 2 * len(layers) + 5


def lora(tmp_path, models, *, name="llama", label="trained", **settings):
    return save_adapter(tmp_path / label, name, models["start"], **settings)


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "settings",
    [
        ATTENTION,
        {"target_modules": ["embed_tokens", "down_proj"], "r": 3, "lora_alpha": 10},
        {**ATTENTION, "use_rslora": True, "r": 3, "lora_alpha": 5},
        {**ATTENTION, "r": 4, "lora_alpha": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}},
    ],
)
def test_a_lora_vector_of_factor_one_comes_out_bit_for_bit(tmp_path, llama, settings):
    trained = lora(tmp_path, llama, **settings)
    vector = TaskVector.between(str(llama["start"]), str(trained))
    vector.save(tmp_path / "vector")
    export_peft([Term(TaskVector.open(tmp_path / "vector"))], tmp_path / "adapter")
    before, after = read(trained)[0], read(tmp_path / "adapter")[0]
    before = {key: tensor for key, tensor in before.items() if "lora_" in key}
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert record(tmp_path / "adapter")["all"] == 0
    one, other = on("llama", llama["start"], trained), on("llama", llama["start"], tmp_path / "adapter")
    assert torch.equal(outputs_of("llama", one), outputs_of("llama", other))


def test_the_configuration_of_a_lora_vector_is_that_of_its_run(tmp_path, llama):
    trained = lora(tmp_path, llama, **ATTENTION)
    export_peft([Term(TaskVector.between(str(llama["start"]), str(trained)))], tmp_path / "adapter")
    config = read(tmp_path / "adapter")[1]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert (config["bias"], config["task_type"], config["base_model_name_or_path"]) == ("none", "CAUSAL_LM", str(llama["start"]))


def test_scale_and_coefficients_multiply_lora_b_and_leave_layers_of_coefficient_zero_out(tmp_path, llama):
    from dataclasses import replace

    trained = lora(tmp_path, llama, **ATTENTION)
    vector = TaskVector.between(str(llama["start"]), str(trained))
    coefficients = {"model.layers.0": 0.0, "model.layers.1": 0.3}
    vector = TaskVector(vector.tensors, replace(vector.manifest, coefficients=coefficients, weighting="linear"))
    export_peft([Term(vector, -2.0)], tmp_path / "adapter")
    before, (after, config) = read(trained)[0], read(tmp_path / "adapter")
    assert set(after) == {key for key in before if ".layers.1." in key}
    for key, tensor in after.items():
        expected = before[key] if "lora_A" in key else (before[key].double() * (-2.0 * 0.3)).float()
        assert torch.equal(tensor, expected)
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_lora_vectors_of_turned_and_renamed_layers_come_out_bit_for_bit(tmp_path, name):
    models = save_family(tmp_path, name)
    targets = {
        "gpt2": {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True},
        "vit": {"target_modules": ["q_proj", "projection", "fc1"]},
    }
    trained = lora(tmp_path, models, name=name, **targets[name])
    export_peft([Term(TaskVector.between(str(models["start"]), str(trained)))], tmp_path / "adapter")
    before, after = read(trained)[0], read(tmp_path / "adapter")[0]
    assert set(before) == set(after)
    assert all(torch.equal(after[key], before[key]) for key in before)
    model = on(name, models["start"], tmp_path / "adapter")
    assert torch.equal(outputs_of(name, model), outputs_of(name, on(name, models["start"], trained)))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_only_the_second_factor_of_turned_embedded_and_convolved_layers_is_multiplied(tmp_path, name):
    models = save_family(tmp_path, name)
    targets = {"gpt2": {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}, "vit": {"target_modules": ["projection", "fc1"]}}
    trained = lora(tmp_path, models, name=name, **targets[name])
    export_peft([Term(TaskVector.between(str(models["start"]), str(trained)), -0.3)], tmp_path / "adapter")
    before, after = read(trained)[0], read(tmp_path / "adapter")[0]
    for key, tensor in before.items():
        first = "lora_A" in key or "lora_embedding_A" in key
        assert torch.equal(after[key], tensor if first else (tensor.double() * -0.3).float()), key
    assert record(tmp_path / "adapter")["all"] < 1e-7


def test_several_lora_vectors_lie_side_by_side_exactly(tmp_path, llama):
    one = lora(tmp_path, llama, label="one", **ATTENTION)
    other = lora(tmp_path, llama, label="other", seed=1, target_modules=["q_proj"], r=3, lora_alpha=6)
    vectors = [TaskVector.between(str(llama["start"]), str(path)) for path in (one, other)]
    export_peft([Term(vectors[0], 0.5), Term(vectors[1], -1.5)], tmp_path / "adapter")
    config = read(tmp_path / "adapter")[1]
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    assert set(config["rank_pattern"].values()) == {2}
    merged = on("llama", llama["start"], tmp_path / "adapter").merge_and_unload().state_dict()
    start = loaded("llama", llama["start"]).state_dict()
    halves = [adapted("llama", llama["start"], path, factor) for path, factor in ((one, 0.5), (other, -1.5))]
    for key, tensor in start.items():
        close(merged[key], sum(half[key] - tensor.double() for half in halves) + tensor.double())


def test_lora_vectors_of_different_scales_have_theirs_in_lora_b(tmp_path, llama):
    one = lora(tmp_path, llama, label="one", **ATTENTION)
    other = lora(tmp_path, llama, label="other", seed=1, lora_alpha=3, **ATTENTION)
    vectors = [TaskVector.between(str(llama["start"]), str(path)) for path in (one, other)]
    export_peft([Term(vectors[0]), Term(vectors[1])], tmp_path / "adapter")
    after, config = read(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 4
    for key in (key for key in after if "lora_B" in key):
        expected = torch.cat([read(one)[0][key] * 2.0, read(other)[0][key] * 1.5], dim=1)
        assert torch.equal(after[key], expected)


def test_a_lora_and_a_dense_vector_share_an_adapter(tmp_path, llama):
    trained = lora(tmp_path, llama, modules_to_save=["lm_head"], **ATTENTION)
    vectors = [TaskVector.between(str(llama["start"]), str(path)) for path in (trained, llama["tuned-1"])]
    export_peft([Term(vectors[0], 0.5), Term(vectors[1], -1.0)], tmp_path / "adapter", rank=64)
    merged = on("llama", llama["start"], tmp_path / "adapter").merge_and_unload().state_dict()
    start, tuned = (loaded("llama", llama[side]).double().state_dict() for side in ("start", "tuned-1"))
    half = adapted("llama", llama["start"], trained, 0.5)
    half["lm_head.weight"] = start["lm_head.weight"] + 0.5 * (half["lm_head.weight"] - start["lm_head.weight"])
    for key, tensor in start.items():
        close(merged[key], half[key] - (tuned[key] - tensor))


def test_a_module_that_a_lora_run_trained_whole_is_cut_like_any_dense_matrix_or_stored_whole(tmp_path, llama):
    trained = lora(tmp_path, llama, modules_to_save=["lm_head", "norm"], **ATTENTION)
    export_peft([Term(TaskVector.between(str(llama["start"]), str(trained)))], tmp_path / "adapter", rank=64)
    told = {name: entry["held"] for name, entry in record(tmp_path / "adapter")["tensors"].items()}
    assert told["lm_head.weight"] == "cut"
    assert told["model.norm.weight"] == "whole"
    assert told["model.layers.0.self_attn.q_proj.weight"] == "factors"
    close(outputs_of("llama", on("llama", llama["start"], tmp_path / "adapter")), outputs_of("llama", on("llama", llama["start"], trained)))


def test_weighted_adapters_of_exports_are_the_weighted_vectors(tmp_path, llama):
    for label, seed in (("one", 0), ("other", 1)):
        trained = lora(tmp_path, llama, label=label, seed=seed, **ATTENTION)
        export_peft([Term(TaskVector.between(str(llama["start"]), str(trained)), 0.5)], tmp_path / f"export-{label}")
    model = on("llama", llama["start"], tmp_path / "export-one")
    model.load_adapter(tmp_path / "export-other", "other")
    model.add_weighted_adapter(["default", "other"], [2.0, -4.0], "both", combination_type="cat")
    model.set_adapter("both")
    merged = model.merge_and_unload().state_dict()
    start = loaded("llama", llama["start"]).double().state_dict()
    halves = [adapted("llama", llama["start"], tmp_path / label, factor) for label, factor in (("one", 1.0), ("other", -2.0))]
    for key, tensor in start.items():
        close(merged[key], sum(half[key] - tensor for half in halves) + tensor)


def test_biases_alone_that_change_beside_a_matrix_are_stored_without_their_matrices(tmp_path):
    models = save_family(tmp_path, "bert")
    tensors = load_file(models["start"] / "model.safetensors")
    query = "bert.encoder.layer.0.attention.self.query"
    for name in (f"{query}.weight", f"{query}.bias", "bert.encoder.layer.1.output.dense.bias"):
        tensors[name] = tensors[name] + 0.5
    tuned = write_model(tmp_path / "tuned", tensors, config=json.loads((models["start"] / "config.json").read_text()))
    export_peft([Term(TaskVector.between(str(models["start"]), str(tuned)))], tmp_path / "adapter")
    after, config = read(tmp_path / "adapter")
    assert config["bias"] == "all"
    assert config["modules_to_save"] is None
    assert {key for key in after if not key.endswith("bias")} == {f"base_model.model.{query}.lora_{side}.weight" for side in "AB"}
    model = on("bert", models["start"], tmp_path / "adapter")
    torch.testing.assert_close(outputs_of("bert", model), outputs_of("bert", loaded("bert", tuned)))
    merged = model.merge_and_unload().state_dict()
    for key, tensor in loaded("bert", tuned).state_dict().items():
        close(merged[key], tensor)


def test_one_expert_that_changes_takes_the_others_along_unchanged(tmp_path):
    models = save_family(tmp_path, "mixtral")
    tensors = load_file(models["start"] / "model.safetensors")
    for name in ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensors[name] = tensors[name] + 0.5
    tuned = write_model(tmp_path / "tuned", tensors, config=json.loads((models["start"] / "config.json").read_text()))
    export_peft([Term(TaskVector.between(str(models["start"]), str(tuned)))], tmp_path / "adapter")
    config = read(tmp_path / "adapter")[1]
    assert config["modules_to_save"] == ["model.layers.1.mlp.experts"]
    merged = on("mixtral", models["start"], tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in loaded("mixtral", tuned).state_dict().items():
        close(merged[key], tensor)


def test_whole_weights_are_bit_for_bit_those_of_a_merge(tmp_path):
    models = save_family(tmp_path, "llama", tied=True, dtype=torch.bfloat16)
    term = Term(between(models), 0.3)
    export_peft([term], tmp_path / "adapter")
    export_to("hf", [term], tmp_path / "merged")
    merged, after = load_file(tmp_path / "merged" / "model.safetensors"), read(tmp_path / "adapter")[0]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[f"base_model.model.{name}"], merged[name])
    assert torch.equal(after["base_model.model.lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_tied_model_stays_tied_when_its_adapter_is_merged(tmp_path):
    models = save_family(tmp_path, "gpt2", tied=True)
    export_peft([Term(between(models))], tmp_path / "adapter")
    merged = on("gpt2", models["start"], tmp_path / "adapter").merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings


def test_a_dtype_is_that_of_every_tensor(tmp_path, llama):
    export_peft([Term(between(llama))], tmp_path / "adapter", dtype="bfloat16")
    assert {tensor.dtype for tensor in read(tmp_path / "adapter")[0].values()} == {torch.bfloat16}
    # The default rank is that of the matrices here; what remains is the rounding.
    assert 1e-4 < record(tmp_path / "adapter")["all"] < 2**-7


def test_progress_ends_with_all_bytes_written(tmp_path, llama):
    calls = []
    export_peft([Term(between(llama))], tmp_path / "adapter", progress=lambda done, size: calls.append((done, size)))
    assert calls[-1] == (sum(tensor.nbytes for tensor in read(tmp_path / "adapter")[0].values()),) * 2


def test_an_export_draws_no_random_numbers(tmp_path, llama):
    before = torch.get_rng_state()
    export_peft([Term(between(llama))], tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_in_memory_replaces_one_on_disk(tmp_path, llama):
    vector = TaskVector.between(loaded("llama", llama["start"]), loaded("llama", llama["tuned-1"]))
    export_peft([Term(vector)], tmp_path / "adapter", onto=loaded("llama", llama["start"]))
    export_peft([Term(between(llama))], tmp_path / "other")
    one, other = read(tmp_path / "adapter")[0], read(tmp_path / "other")[0]
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_model_that_was_never_saved_can_be_the_start(tmp_path):
    start, tuned = tiny_llama(0), tiny_llama(1)
    assert start.config.architectures is None
    export_peft([Term(TaskVector.between(start, tuned))], tmp_path / "adapter", onto=start)
    merged = PeftModel.from_pretrained(tiny_llama(0), tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in tuned.state_dict().items():
        close(merged[key], tensor)


def refused(tmp_path, kind, message, terms, **options):
    with pytest.raises(kind, match=message):
        export_peft(terms, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    assert not leftovers(tmp_path)


def test_a_start_without_a_config_is_refused(tmp_path, llama):
    checkpoint = write_checkpoint(tmp_path / "start.ckpt", load_file(llama["start"] / "model.safetensors"), prefix="")
    vector = TaskVector.between(str(checkpoint), str(llama["tuned-1"]))
    refused(tmp_path, LataError, "start.ckpt has no config.json, which says what its modules are", [Term(vector)])


def test_a_model_that_transformers_cannot_build_is_refused(tmp_path, llama):
    start = write_model(tmp_path / "start", load_file(llama["start"] / "model.safetensors"))
    vector = TaskVector.between(str(start), str(llama["tuned-1"]), check_config=False)
    refused(
        tmp_path, LataError, r"transformers cannot build the model that the config of .* describes \(architectures: None\)", [Term(vector)]
    )


def test_a_vector_without_a_matrix_to_adapt_is_refused(tmp_path, llama):
    tensors = load_file(llama["start"] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    vector = TaskVector.between(str(llama["start"]), tmp_path / "tuned.safetensors")
    refused(tmp_path, LataError, "in no layer that peft can factor, 1: .*model.norm.weight.*--to hf", [Term(vector)])
    refused(tmp_path, LataError, "needs a matrix to adapt, and nothing changes", [Term(vector, 0.0)])


def test_tensors_that_no_module_has_are_refused(tmp_path, llama):
    config = json.loads((llama["start"] / "config.json").read_text())
    tensors = {**load_file(llama["start"] / "model.safetensors"), "model.extra": torch.zeros(3)}
    start = write_model(tmp_path / "start", tensors, config=config)
    tuned = write_model(tmp_path / "tuned", {**tensors, "model.extra": torch.ones(3)}, config=config)
    vector = TaskVector.between(str(start), str(tuned))
    refused(tmp_path, LataError, "LlamaForCausalLM has; in no module are 1: .*model.extra", [Term(vector)])


def test_a_start_that_lacks_a_part_of_a_module_is_refused(tmp_path):
    models = save_family(tmp_path, "bert")
    config = json.loads((models["start"] / "config.json").read_text())
    lone = "bert.embeddings.LayerNorm.bias"
    start, tuned = (
        write_model(
            tmp_path / label,
            {key: value for key, value in load_file(models[side] / "model.safetensors").items() if key != lone},
            config=config,
        )
        for label, side in (("less", "start"), ("less-tuned", "tuned-1"))
    )
    vector = TaskVector.between(str(start), str(tuned))
    refused(tmp_path, LataError, f"lacks parts of those that change: 1: .*{lone}", [Term(vector)])


def test_parameters_of_the_model_itself_are_refused(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": 4}
    clip = CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 8}, vision_config={**small, "image_size": 4, "patch_size": 2}, projection_dim=4)
    )
    clip.save_pretrained(tmp_path / "clip")
    with torch.no_grad():
        clip.logit_scale.add_(1)
    clip.save_pretrained(tmp_path / "clip-tuned")
    vector = TaskVector.between(str(tmp_path / "clip"), str(tmp_path / "clip-tuned"))
    refused(tmp_path, LataError, "of the model itself are 1: .*logit_scale", [Term(vector)])


def test_what_peft_would_take_for_another_adapter_is_refused(tmp_path, llama, monkeypatch):
    saved = peft.utils.get_peft_model_state_dict
    monkeypatch.setattr(
        peft.utils,
        "get_peft_model_state_dict",
        lambda *given, **more: {k: v for k, v in saved(*given, **more).items() if "q_proj" not in k},
    )
    refused(
        tmp_path,
        LataError,
        r"peft takes the adapter for other modules than it is made for; 4 of \d+ tensors differ, first: ",
        [Term(between(llama))],
    )


def test_what_peft_refuses_is_refused_in_one_line(tmp_path, llama, monkeypatch):
    def no(*given, **more):
        raise ValueError("not this one\nand a long story")

    monkeypatch.setattr(peft, "get_peft_model", no)
    refused(tmp_path, LataError, "^peft cannot adapt LlamaForCausalLM so: not this one$", [Term(between(llama))])


def test_another_start_than_that_of_the_vector_is_refused(tmp_path, llama):
    between(llama).save(tmp_path / "vector")
    vector = TaskVector.open(tmp_path / "vector")
    refused(tmp_path, BaseMismatchError, "these are different weights", [Term(vector)], onto=llama["base"])
    export_peft([Term(vector)], tmp_path / "adapter", onto=llama["base"], check_base=False)


def test_vectors_of_two_starts_are_refused(tmp_path, llama):
    between(llama).save(tmp_path / "one")
    TaskVector.between(str(llama["base"]), str(llama["tuned-1"])).save(tmp_path / "other")
    terms = [Term(TaskVector.open(tmp_path / label)) for label in ("one", "other")]
    refused(tmp_path, BaseMismatchError, "their sum has no common origin", terms)


@pytest.mark.parametrize(("name", "message"), [("model.norm.weight", "NaN"), ("model.layers.0.self_attn.q_proj.weight", "NaN or infinite")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, llama, name, message):
    tensors = load_file(llama["tuned-1"] / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "tuned.safetensors")
    vector = TaskVector.between(str(llama["start"]), tmp_path / "tuned.safetensors")
    refused(tmp_path, CorruptFileError, f"{name}: .*{message}", [Term(vector)])


def test_an_output_that_exists_is_refused_before_any_work(tmp_path):
    (tmp_path / "theirs").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        export_peft([], tmp_path)
