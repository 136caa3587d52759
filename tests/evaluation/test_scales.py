"""Weights set in memory are those that a merge writes, for whatever a merge can add."""

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny_models import llama, read_back, same_bits

from lata_lightning.evaluation.scales import Reweighting, best_scale
from lata_lightning.evaluation.tuning import tune
from lata_lightning.merging.merge import Term, merge
from lata_lightning.vectors.task_vector import TaskVector

KINDS = ("llama", "gemma2", "gpt2", "bert", "bart", "mixtral", "qwen3_moe", "t5", "vit")


def built(kind, seed=0, **more):
    torch.manual_seed(seed)
    entry = ARCHITECTURES[kind]
    model = entry.model(entry.config(**entry.settings, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model, directory):
    model.save_pretrained(directory)
    return directory


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_files", [True, False])
def test_the_weights_are_those_that_a_merge_of_the_directories_loads(tmp_path, kind, from_files):
    model, tuned = built(kind), built(kind, 1)
    start, other = saved(model, tmp_path / "start"), saved(tuned, tmp_path / "tuned")
    vector = TaskVector.between(start, other) if from_files else TaskVector.between(model, tuned)
    before = state(model)
    weights = Reweighting(model)
    weights.apply([Term(vector, 0.3)])
    merge(start, [Term(TaskVector.between(start, other), 0.3)], tmp_path / "merged")
    assert same_bits(state(model), state(type(model).from_pretrained(tmp_path / "merged")))
    # The second point counts from the model itself, not from the first.
    weights.apply([Term(vector, -0.2), Term(vector, 0.7)])
    merge(start, [Term(TaskVector.between(start, other), scale) for scale in (-0.2, 0.7)], tmp_path / "second")
    assert same_bits(state(model), state(type(model).from_pretrained(tmp_path / "second")))
    weights.restore()
    assert same_bits(state(model), before)


def test_a_vector_without_the_prefix_of_the_model_is_applied_as_a_merge_applies_it(tmp_path):
    prefix, (model, tuned) = "transformer.", (built("gpt2"), built("gpt2", 1))
    start, other = saved(model, tmp_path / "start"), saved(tuned, tmp_path / "tuned")
    for directory in (start, other):
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
        )
    vector, before = TaskVector.between(start, other), state(model)
    assert not any(name.startswith(prefix) for name in vector)
    Reweighting(model).apply([Term(vector, 0.5)])
    live, own = state(model), state(tuned)
    assert not same_bits(live, before)
    for name in before:
        if before[name].is_floating_point():
            torch.testing.assert_close(live[name], before[name] + 0.5 * (own[name] - before[name]), rtol=1e-5, atol=1e-6)


def test_a_tied_head_that_the_vector_stores_twice_is_one_tensor(tmp_path):
    model, tuned = llama(tied=True), llama(1, tied=True)
    start, other = saved(model, tmp_path / "start"), saved(tuned, tmp_path / "tuned")
    for directory in (start, other):
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    vector = TaskVector.between(start, other)
    Reweighting(model).apply([Term(vector, 0.5)])
    merge(start, [Term(vector, 0.5)], tmp_path / "merged")
    assert torch.equal(model.lm_head.weight, read_back(tmp_path / "merged")["lm_head.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_floating_buffer_is_set_too():
    class Scaled(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.register_buffer("factor", torch.full((2,), value))

    model, tuned = Scaled(1.0), Scaled(3.0)
    vector = TaskVector.between(
        {"linear.weight": model.linear.weight, "linear.bias": model.linear.bias, "factor": model.factor},
        {"linear.weight": tuned.linear.weight, "linear.bias": tuned.linear.bias, "factor": tuned.factor},
    )
    Reweighting(model).apply([Term(vector, 1.0)])
    torch.testing.assert_close(model.linear.weight, tuned.linear.weight)
    torch.testing.assert_close(model.factor, tuned.factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_the_files_are_where_the_model_is_wider(tmp_path, dtype):
    start, other = saved(llama(dtype=dtype), tmp_path / "start"), saved(llama(1, dtype=dtype), tmp_path / "tuned")
    vector = TaskVector.between(start, other)
    model = type(llama()).from_pretrained(start, dtype=torch.float32)
    Reweighting(model, dict.fromkeys(load_file(start / "model.safetensors"), dtype)).apply([Term(vector, 0.3)])
    merge(start, [Term(vector, 0.3)], tmp_path / "merged")
    merged = read_back(tmp_path / "merged")
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in merged.items())


def test_a_vector_of_fused_experts_can_be_tuned(tmp_path):
    model, tuned = built("mixtral"), built("mixtral", 1)
    vector = TaskVector.between(saved(model, tmp_path / "start"), saved(tuned, tmp_path / "tuned"))
    wanted = tuned.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    found = tune(
        model,
        {"none": [vector]},
        {"near": lambda now: -(now.model.layers[0].mlp.experts.gate_up_proj - wanted).norm().item()},
        grid=(0.5, 1.0, 1.5),
    )
    assert found.best.scale == 1.0
    assert found.best.score == pytest.approx(0, abs=1e-5)


def test_of_equal_scores_the_smallest_scale_is_the_best():
    assert best_scale({1.0: 0.5, 0.5: 0.5, 0.0: 0.1}) == 0.5
