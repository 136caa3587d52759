"""Peft adapter directories and models against sums that are formed in float64 from the stored factors, by the definition of LoRA."""

import warnings

import peft
import pytest
import torch
from adapter_models import WEIGHTS, adapter, by_hand, close, noise_on, wrapped
from architectures import ARCHITECTURES, both_precisions, loaded, moved, outputs_of, tiny_model
from safetensors.torch import load_file
from tiny_models import read_back

from lata_lightning import TaskVector, Term, forget, merge
from lata_lightning.store.opening import open_source


@both_precisions
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_adds_what_its_factors_say_on_every_architecture(tmp_path, name, dtype):
    start, place, model = adapter(tmp_path, name, dtype=dtype, fan_in_fan_out=name == "gpt2")
    expected, weights = by_hand(start, place), read_back(start)
    assert expected
    vector = TaskVector.between(start, place)
    close(vector, expected)
    close(TaskVector.between(start, model), expected)
    assert {entry for entry in vector if vector.low_rank(entry) is not None} == set(expected)
    assert vector.unchanged == set(vector) - set(expected)
    # Peft forms the sum in the weights' precision: nowhere is it closer to the exact sum than ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, ours = read_back(tmp_path / "peft"), read_back(merge(start, [Term(vector)], tmp_path / "merged"))
    assert set(ours) == set(weights)
    for entry, weight in weights.items():
        assert ours[entry].dtype == dtype
        if entry in expected:
            exact = weight.double() + expected[entry]
            assert ((ours[entry].double() - exact).abs() <= (theirs[entry].double() - exact).abs()).all(), entry
        else:
            assert torch.equal(ours[entry], weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral"])
def test_the_merged_model_answers_as_the_adapted_one(tmp_path, name):
    start, place, model = adapter(tmp_path, name, fan_in_fan_out=name == "gpt2")
    merge(start, [Term(TaskVector.between(start, place))], tmp_path / "merged")
    torch.testing.assert_close(outputs_of(name, loaded(name, tmp_path / "merged")), outputs_of(name, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 factors", "bfloat16 factors"])
def test_a_half_precision_base_with_factors_of_either_precision_is_exact(tmp_path, autocast):
    start, place, model = adapter(tmp_path, dtype=torch.bfloat16, autocast=autocast)
    held = load_file(place / WEIGHTS)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32 if autocast else torch.bfloat16}
    close(TaskVector.between(start, place), by_hand(start, place))
    saved = TaskVector.between(start, model).save(tmp_path / "vector")
    close(saved, by_hand(start, place))
    assert saved.manifest.precision_loss is None


def test_a_model_that_was_loaded_in_another_precision_is_still_that_of_its_start(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "start")
    model = wrapped(loaded("llama", tmp_path / "start").to(torch.bfloat16), target_modules=["q_proj"])
    vector = TaskVector.between(tmp_path / "start", model)
    assert set(vector) - vector.unchanged == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(2)}


def dense_tuned(start, directory, seed=5, name="llama"):
    moved(loaded(name, start), seed=seed).save_pretrained(directory)
    return directory


def test_an_adapter_directory_stands_for_the_whole_model_it_makes(tmp_path):
    start, place, _ = adapter(tmp_path, modules_to_save=["lm_head"])
    expected, weights = by_hand(start, place), read_back(start)
    whole = open_source(place)
    for name in whole.names:
        assert torch.equal(whole.read(name), (weights[name].double() + expected.get(name, 0)).float()), name
    tuned = dense_tuned(start, tmp_path / "tuned")
    # As START, with dense weights as TUNED.
    vector = TaskVector.between(place, tuned)
    for name in vector:
        assert torch.equal(vector[name], read_back(tuned)[name] - whole.read(name))
    # As ONTO and as TARGET.
    other = TaskVector.between(start, tuned)
    merged = read_back(merge(place, [Term(other, 0.5)], tmp_path / "merged", check_base=False))
    forget(place, Term(TaskVector.between(start, place)), tmp_path / "forgotten")
    for name, weight in weights.items():
        exact = whole.read(name).double() + 0.5 * other[name].double()
        assert torch.equal(merged[name], exact.float())
        torch.testing.assert_close(read_back(tmp_path / "forgotten")[name], weight, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "merged/config.json").is_file()


def test_between_two_adapters_of_one_base_lies_what_the_second_learned(tmp_path):
    start, first, _ = adapter(tmp_path, modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = peft.PeftModel.from_pretrained(loaded("llama", start), first, is_trainable=True)
    noise_on(second, 77, 1e-4)
    second.save_pretrained(tmp_path / "second")
    expected = by_hand(start, tmp_path / "second")
    expected = {name: delta - by_hand(start, first)[name] for name, delta in expected.items()}
    for tuned in (tmp_path / "second", second):
        vector = TaskVector.between(first, tuned)
        assert vector.low_rank("model.layers.0.self_attn.q_proj.weight").rank == 6
        for name in vector:
            want = expected.get(name, torch.zeros(vector.shape(name)).double())
            assert (vector[name].double() - want).norm() <= 1e-6 * want.norm(), name
        saved = vector.save(tmp_path / f"vector {tuned is second}")
        want = expected["model.layers.0.self_attn.q_proj.weight"]
        assert (saved["model.layers.0.self_attn.q_proj.weight"].double() - want).norm() <= 1e-6 * want.norm()
        # A tensor is unchanged from adapter to adapter where neither acts on it.
        assert vector.unchanged == set(vector) - set(expected)
    # Counted from the first adapter, not from the base: added to it, the second comes out.
    merged = read_back(merge(first, [Term(TaskVector.between(first, tmp_path / "second"))], tmp_path / "merged"))
    for name in merged:
        torch.testing.assert_close(merged[name], open_source(tmp_path / "second").read(name), rtol=1e-6, atol=1e-7)


def test_between_adapters_of_other_targets_and_ranks_lies_their_difference(tmp_path):
    start, first, _ = adapter(tmp_path, target_modules=["q_proj", "down_proj", "lm_head"])
    _, second, _ = adapter(tmp_path, adapter_name="second", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], r=2, seed=50)
    one, two = by_hand(start, first), by_hand(start, second)
    vector = TaskVector.between(first, second)
    for name in vector:
        want = two.get(name, 0) - one.get(name, torch.zeros(vector.shape(name)).double())
        torch.testing.assert_close(vector[name].double(), torch.as_tensor(want), rtol=1e-5, atol=1e-7)
    assert vector.low_rank("lm_head.weight") is None
    assert vector.unchanged == set(vector) - set(one) - set(two)
    same = TaskVector.between(first, first)
    assert not any(same[name].any() for name in same)
