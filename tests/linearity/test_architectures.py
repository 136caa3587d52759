"""Real architectures against a reference that holds every model whole, hooks the modules written down here, and stacks their outputs."""

import copy

import numpy as np
import pytest
import torch
import transformers
from linear_models import tuned
from small_architectures import SMALL, TEXT, build, samples_of

from lata_lightning import TaskVector, solve_coefficients
from lata_lightning.errors import LataError
from lata_lightning.linearity.scores import measure_linearity, nonlinearity

DECODER = {**TEXT, "num_key_value_heads": 1}
# Model class, config class, settings; then, per block: name of the layer in checkpoints, path of the module, and names of the tensors that move in it
# (by their beginning, relative to the module; "" for all).
ARCHITECTURES = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", DECODER,
        {
            f"model.layers.{n}{layer}": (f"model.layers.{n}{module}", "")
            for n in (0, 1) for layer, module in {"": "", ".attention": ".self_attn", ".mlp": ".mlp"}.items()
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8, "tie_word_embeddings": True},
        {
            f"model.layers.{n}{layer}": (f"model.layers.{n}{module}", "")
            for n in (0, 1) for layer, module in {"": "", ".attention": ".self_attn", ".mlp": ".mlp"}.items()
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {
            f"transformer.h.{n}{layer}": (f"transformer.h.{n}{module}", "")
            for n in (0, 1) for layer, module in {"": "", ".attention": ".attn", ".mlp": ".mlp"}.items()
        },
    ),
    "bert": (
        "BertForMaskedLM", "BertConfig", TEXT,
        {
            f"bert.encoder.layer.{n}{layer}": (f"bert.encoder.layer.{n}{module}", moved)
            for n in (0, 1)
            for layer, (module, moved) in {
                "": ("", ""),
                # Each part ends in a norm of its own; the MLP is two modules side by side, so the block is run with only them moved.
                ".attention": (".attention", ""),
                ".mlp": ("", ("intermediate.", "output.")),
            }.items()
        },
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4},
        {
            f"vit.encoder.layer.{n}{layer}": (f"vit.layers.{n}{module}", "")
            for n in (0, 1) for layer, module in {"": "", ".attention": ".attention", ".mlp": ".mlp"}.items()
        },
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
        {
            f"{side}.block.{n}{layer}": (f"{side}.block.{n}{module}", "")
            for n in (0, 1)
            for side, mlp in (("encoder", 1), ("decoder", 2))
            for layer, module in {
                "": "",
                ".attention": ".layer.0.SelfAttention",
                ".mlp": f".layer.{mlp}.DenseReluDense",
                **({".cross_attention": ".layer.1.EncDecAttention"} if side == "decoder" else {}),
            }.items()
        },
    ),
}  # fmt: skip


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


def calls_of(model, path, inputs):
    """Arguments of every call of a module in one run of a model."""
    calls = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))
    handle.remove()
    return calls


def moved_module(start, model, path, beginnings):
    """A copy of a module of the start with those tensors of a tuned model."""
    module = copy.deepcopy(start.get_submodule(path))
    other = dict(model.get_submodule(path).named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(beginnings):
                parameter.copy_(other[name])
    return module


def reference(start, models, path, beginnings, samples):
    """Least-squares coefficients of a module from its outputs, each task divided by the root of its positions."""
    variants = [moved_module(start, model, path, beginnings) for model in models]
    columns, aims = [], []
    for task, batches in enumerate(samples):
        changes = []
        for inputs in batches:
            mask = inputs.get("decoder_attention_mask" if path.startswith("decoder") else "attention_mask")
            for args, kwargs in calls_of(start, path, inputs):
                with torch.no_grad():
                    own = hidden(start.get_submodule(path)(*args, **kwargs))
                    shifts = [hidden(variant(*args, **kwargs)) - own for variant in variants]
                changes.append(torch.stack([shift.flatten(0, 1) if mask is None else shift[mask.bool()] for shift in shifts]))
        found = torch.cat(changes, dim=1).double()
        found = found.flatten(1) / found.shape[1] ** 0.5
        columns.append(found.T)
        aims.append(found[task])
    return np.linalg.lstsq(torch.cat(columns).numpy(), torch.cat(aims).numpy(), rcond=None)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coefficients_equal_those_of_whole_models_with_plain_hooks(name, tmp_path):
    start, models, layers = build(ARCHITECTURES[name])
    samples = samples_of(name)
    start.save_pretrained(tmp_path / "start")
    vectors = [TaskVector.between(start, model) for model in models]
    solved = {level: solve_coefficients(tmp_path / "start", vectors, samples, level=level) for level in ("block", "submodule")}
    parts = (".attention", ".mlp", ".cross_attention")
    for level, solution in solved.items():
        assert set(solution.fits) == {layer for layer in layers if layer.endswith(parts) == (level == "submodule")}
    for layer, (path, beginnings) in layers.items():
        solution = solved["submodule" if layer.endswith(parts) else "block"]
        found = [vector.coefficients[layer] for vector in solution.vectors]
        # The reference has no ridge; the default one moves a well determined solution by about a millionth.
        assert found == pytest.approx(reference(start, models, path, beginnings, samples), abs=1e-4), layer
        assert all(0 < number < 1.2 for number in found), layer


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_scores_equal_those_of_whole_models_with_plain_hooks(name):
    start, models, layers = build(ARCHITECTURES[name])
    samples = samples_of(name)
    (found,) = measure_linearity(start, [TaskVector.between(start, models[0])], samples[:1])
    scores = {score.layer: score for score in found.scores}
    assert set(scores) == {"model", *layers}

    def along(scale):
        model = copy.deepcopy(start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(scale * (models[0].get_parameter(name) - parameter))
        return model

    points = {scale: along(scale) for scale in (0.0, 0.25, 0.5, 0.75, 1.0)}

    def score(path, block, inputs, *, branch):
        """Of a module by itself, or of its block with only this module moved, by position."""
        where = path if branch else block
        ((args, kwargs),) = calls_of(start, where, inputs)
        mask = inputs.get("decoder_attention_mask" if path.startswith("decoder") else "attention_mask")

        def at(scale):
            module = copy.deepcopy(start.get_submodule(where))
            moved = points[scale].get_submodule(path).state_dict()
            module.get_submodule(path[len(where) :].lstrip(".")).load_state_dict(moved)
            with torch.no_grad():
                output = hidden(module(*args, **kwargs))
            return output.flatten(0, 1) if mask is None else output[mask.bool()]

        return nonlinearity(at)

    for layer, (path, _) in layers.items():
        block = next(layers[other][0] for other in sorted(layers, key=len) if layer == other or layer.startswith(f"{other}."))
        for side in ("branch", "output"):
            expected = torch.cat([score(path, block, inputs, branch=side == "branch") for inputs in samples[0]]).mean().item()
            assert getattr(scores[layer], side) == pytest.approx(expected, rel=1e-4), (layer, side)

    def features(scale, inputs):
        model = points[scale]
        with torch.no_grad():
            output = model(**inputs)[0] if name == "t5" else model.base_model(**inputs)[0]
        mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
        return output.flatten(0, 1) if mask is None else output[mask.bool()]

    whole = torch.cat([nonlinearity(lambda scale, inputs=inputs: features(scale, inputs)) for inputs in samples[0]])
    assert scores["model"].output == pytest.approx(whole.mean().item(), rel=1e-4)
    assert scores["model"].branch is None


def test_a_part_that_is_no_module_of_its_own_has_no_branch():
    start, models, _ = build(ARCHITECTURES["bert"])
    (found,) = measure_linearity(start, [TaskVector.between(start, models[0])], samples_of("bert")[:1])
    scores = {score.layer: score for score in found.scores}
    assert scores["bert.encoder.layer.0.mlp"].branch is None
    assert scores["bert.encoder.layer.0.mlp"].output > 0
    assert scores["bert.encoder.layer.0.attention"].branch > 0


def test_inputs_that_lack_the_decoder_are_refused_by_the_model_itself():
    start, models, _ = build(ARCHITECTURES["t5"])
    inputs = {"input_ids": torch.tensor([[3, 4]])}
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        solve_coefficients(start, [TaskVector.between(start, models[0])], [[inputs]])


def test_experts_that_are_stored_one_by_one_are_run_together(tmp_path):
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    start = transformers.MixtralForCausalLM(config).eval()
    models = [tuned(start, size=0.05, seed=seed) for seed in (1, 2)]
    start.save_pretrained(tmp_path / "start")
    samples = samples_of("llama")
    solution = solve_coefficients(tmp_path / "start", [TaskVector.between(start, model) for model in models], samples, level="submodule")
    for index in (0, 1):
        found = [vector.coefficients[f"model.layers.{index}.mlp"] for vector in solution.vectors]
        assert found == pytest.approx(reference(start, models, f"model.layers.{index}.mlp", "", samples), abs=1e-4)


def test_a_block_that_is_run_several_times_counts_every_time():
    config = transformers.AlbertConfig(**TEXT, embedding_size=16)
    torch.manual_seed(0)
    start = transformers.AlbertModel(config).eval()
    models = [tuned(start, size=0.05, seed=seed) for seed in (1, 2)]
    samples = samples_of("bert")
    solution = solve_coefficients(start, [TaskVector.between(start, model) for model in models], samples)
    path = "encoder.albert_layer_groups.0.albert_layers.0"
    assert len(calls_of(start, path, samples[0][0])) == 2
    found = [vector.coefficients[path] for vector in solution.vectors]
    assert found == pytest.approx(reference(start, models, path, "", samples), abs=1e-4)


def test_vectors_of_another_architecture_are_refused():
    start, models, _ = build(ARCHITECTURES["llama"])
    other, tuned_others, _ = build(ARCHITECTURES["gpt2"])
    with pytest.raises(LataError, match="must hold the same tensors"):
        solve_coefficients(start, [TaskVector.between(other, tuned_others[0])], [samples_of("llama")[0]])
    assert models
