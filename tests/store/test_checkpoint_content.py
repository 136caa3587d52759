import argparse
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import llama, same_bits, weights
from torch import nn
from transformers import LlamaConfig

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.errors import SourceError
from lata_lightning.store.checkpoint_content import UnknownModelError, part_of
from lata_lightning.store.opening import narrowed, open_source


def contents(source):
    return {name: source.read(name) for name in source.names}


def saved(path, content):
    torch.save(content, path)
    return path


def under(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


KEYS = ["state_dict", "model_state_dict", "model", "module", "model_state", "weights", "params", "network", "net", "generator"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".consolidated", ".pth.tar", ""])
def test_a_state_dict_is_found_under_any_key_in_a_file_of_any_suffix(tmp_path, key, suffix):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    path = saved(tmp_path / f"last{suffix}", {key: weights(), "optimizer": optimizer, "epoch": 3, "rng_state": torch.ones(4)})
    assert same_bits(contents(open_source(path)), weights())


def test_a_bare_state_dict_is_read(tmp_path):
    assert same_bits(contents(open_source(saved(tmp_path / "lit_model.pth", weights()))), weights())


@pytest.mark.parametrize(
    "value",
    [
        Path("/data"), np.float64(1), np.arange(3), argparse.Namespace(lr=1),
        functools.partial(torch.optim.AdamW, lr=1), LlamaConfig(), nn.functional.gelu,
        torch.device("cpu"), torch.float16, {1, 2}, nn.Linear(2, 2), slice(1), range(3), complex(1, 2), ValueError("x"), torch.Generator,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_objects_beside_the_weights_do_not_matter(tmp_path, value):
    path = saved(tmp_path / "a.ckpt", {"state_dict": weights(), "hyper_parameters": {"x": value}, "callbacks": {"y": [value]}})
    assert same_bits(contents(open_source(path)), weights())


def test_names_lose_the_parts_that_wrappers_add(tmp_path):
    path = saved(tmp_path / "a.pt", {"_orig_mod.layer._checkpoint_wrapped_module.weight": torch.ones(1)})
    assert open_source(path).names == ("layer.weight",)


def test_tensors_elsewhere_in_a_checkpoint_are_not_taken_for_a_model(tmp_path):
    path = saved(
        tmp_path / "a.ckpt", {"state_dict": weights(), "hyper_parameters": {"class_weights": torch.ones(3)}, "loops": {"x": torch.ones(1)}}
    )
    assert same_bits(contents(open_source(path)), weights())


# Several models


TWO = {"actor": weights(1), "reference": weights(2)}


def test_two_models_under_two_keys_are_refused_and_picked_by_name(tmp_path):
    path = saved(tmp_path / "a.pt", TWO)
    with pytest.raises(
        SourceError, match=r"must hold the model once; it holds 2: \['actor', 'reference'\]. Say which to take: --model actor"
    ):
        open_source(path)
    for name, tensors in TWO.items():
        assert same_bits(contents(open_source(path, name)), tensors)


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "model_ema", "teacher"])
def test_a_running_average_beside_the_model_is_refused_and_picked_by_name(tmp_path, key):
    path = saved(tmp_path / "a.pt", {"state_dict": weights(1), key: weights(2)})
    with pytest.raises(SourceError, match="must hold the model once"):
        open_source(path)
    assert same_bits(contents(open_source(path, key)), weights(2))
    assert same_bits(contents(open_source(path, "state_dict")), weights(1))


def test_a_module_inside_a_state_dict_is_picked_by_name(tmp_path):
    state = under("actor", TWO["actor"]) | under("reference", TWO["reference"])
    for content in (state, {"state_dict": state}):
        path = saved(tmp_path / "a.pt", content)
        assert same_bits(contents(open_source(path, "reference")), TWO["reference"])
    assert same_bits(contents(open_source(path, "state_dict.actor")), TWO["actor"])
    assert same_bits(contents(open_source(state, "actor")), TWO["actor"])
    assert same_bits(contents(open_source(open_source(state), "actor")), TWO["actor"])
    pair = nn.ModuleDict({"actor": nn.Linear(2, 2), "reference": nn.Linear(2, 2)})
    assert same_bits(contents(open_source(pair, "actor")), dict(pair["actor"].state_dict()))


def test_a_name_that_nothing_has_is_refused_with_the_nearest(tmp_path):
    path = saved(tmp_path / "a.pt", {"state_dict": under("actor", weights()) | under("reference", weights())})
    with pytest.raises(UnknownModelError, match=r"holds nothing named 'acter'; it has 2: \['actor', 'reference'\]. Did you mean 'actor'?"):
        open_source(path, "acter")
    with pytest.raises(UnknownModelError):
        part_of({"a.b": 1}, "c", "x")


def test_a_name_need_only_be_known_on_one_side(tmp_path):
    path = saved(tmp_path / "a.pt", under("actor", weights(1)) | under("reference", weights(0)))
    start, tuned = narrowed([weights(0), path], "actor")
    assert start is not None
    assert same_bits(contents(open_source(tuned)), weights(1))
    with pytest.raises(UnknownModelError):
        narrowed([weights(0), weights(1)], "actor")
    assert narrowed([path], None) == [path]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_name_of_all_of_a_model_in_a_checkpoint_leaves_no_head_out(tmp_path, in_memory):
    states = [dict(llama(seed).state_dict()) for seed in range(3)]
    llama(0).save_pretrained(tmp_path / "start")
    path = saved(tmp_path / "a.pt", {"model": states[1], "ema": states[2]})
    vector = TaskVector.between(states[0] if in_memory else tmp_path / "start", path, model="model")
    assert set(vector) == set(states[0])
    assert torch.equal(vector["lm_head.weight"], states[1]["lm_head.weight"] - states[0]["lm_head.weight"])


def test_tied_tensors_of_one_of_several_models_stay_tied(tmp_path):
    shared = torch.ones(2, 2)
    path = saved(tmp_path / "a.pt", {"one.embed": shared, "one.head": shared, "two.embed": shared.clone(), "one.w": torch.zeros(1)})
    source = open_source(path, "one")
    assert (source.names, source.tied) == (("embed", "w"), {"head": "embed"})


def test_the_command_line_picks_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights(0), "start.pt")
    torch.save({"state_dict": under("actor", weights(1)) | under("reference", weights(0))}, "both.ckpt")
    assert main(["extract", "start.pt", "both.ckpt", "--output", "none"]) == 1
    assert "must hold the model once" in capsys.readouterr().err
    assert main(["extract", "start.pt", "both.ckpt", "--model", "actor", "--output", "vector"]) == 0
    expected = {name: weights(1)[name] - weights(0)[name] for name in weights()}
    assert all(torch.equal(TaskVector.open("vector")[name], value) for name, value in expected.items())
    assert main(["extract", "both.ckpt", "both.ckpt", "--model", "acter", "--output", "other"]) == 1
    assert "Did you mean 'actor'?" in capsys.readouterr().err
    assert main(["inspect", "both.ckpt", "--model", "actor"]) == 0
    assert main(["merge", "start.pt", "both.ckpt", "--model", "actor", "--output", "merged"]) == 0
    merged = contents(open_source("merged"))
    assert all(torch.allclose(merged[name], value) for name, value in weights(1).items())
    assert main(["merge", "start.pt", "vector", "--model", "actor", "--output", "again"]) == 1


# What is not the whole model


def test_one_file_of_a_deepspeed_checkpoint_is_refused_unless_it_is_whole(tmp_path):
    part = {"module": weights(), "ds_version": "0.19", "param_shapes": [{"a": torch.Size([2])}]}
    with pytest.raises(SourceError, match=r"one file of a DeepSpeed ZeRO checkpoint.*python zero_to_fp32.py"):
        open_source(saved(tmp_path / "mp_rank_00_model_states.pt", part))
    whole = saved(tmp_path / "whole.pt", {**part, "param_shapes": None})
    assert same_bits(contents(open_source(whole)), weights())
