import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    BLOCKS,
    leftovers,
    llama,
    plus,
    read_back,
    same_bits,
    tied_to_embedding,
    weights,
    write_checkpoint,
    write_model,
)

from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, OutputError, SourceError
from lata_lightning.merging.merge import Term, forget, merge
from lata_lightning.numerics.combine import combine
from lata_lightning.store import writer
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.task_vector import TaskVector

GRID = 2.0**-10


def vector(tensors, **options):
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def weighted(task, instruction, rule="linear", **options):
    return task.weighted(align(task, instruction, check_base=False), rule, **options)


def summed(onto, *terms):
    """onto + Σ factor · vector in numpy's float64, for one tensor: vectors first, then the weights."""
    update = sum(np.float64(factor) * tensor.double().numpy() for tensor, factor in terms)
    return onto.double().numpy() + update


def nearest(exact, dtype):
    """A float64 array correctly rounded to bfloat16 or float16, from their definition in rationals; ties to even."""
    digits, smallest = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    found = []
    for value in np.asarray(exact, dtype=np.float64).reshape(-1):
        exponent = max(math.frexp(value)[1] - 1, smallest) if value else smallest
        unit = Fraction(2) ** (exponent - digits + 1)
        # round() of a fraction goes to the nearest integer, and to the even one in the middle.
        found.append(math.copysign(float(round(Fraction(float(value)) / unit) * unit), value))
    return torch.tensor(found, dtype=torch.float64).reshape(np.shape(exact))


# Laws


@pytest.mark.parametrize("scale", [0.0, 0.37, 1.0, -1.0, 3.5])
def test_without_coefficients_a_merge_is_plain_task_arithmetic_to_the_last_bit(tmp_path, scale):
    onto, one, other = weights(0), weights(1), weights(2)
    merge(onto, [Term(vector(one), scale), Term(vector(other), 0.25)], tmp_path / "out")
    expected = {name: torch.from_numpy(summed(onto[name], (one[name], scale), (other[name], 0.25))).float() for name in onto}
    assert same_bits(read_back(tmp_path / "out"), expected)


def test_coefficients_of_one_everywhere_are_plain_task_arithmetic_to_the_last_bit(tmp_path):
    onto, task = weights(0), vector(weights(1))
    ones = weighted(task, vector(weights(2)), "none", outside=1.0)
    merge(onto, [Term(task, 0.7)], tmp_path / "plain")
    merge(onto, [Term(ones, 0.7)], tmp_path / "ones")
    assert same_bits(read_back(tmp_path / "plain"), read_back(tmp_path / "ones"))


def test_tensors_that_are_known_to_be_zero_are_not_even_read(tmp_path):
    task = vector(weights(1))
    frozen = "model.layers.0.mlp.up_proj.weight"
    entries = {name: TensorEntry(task.shape(name), "float32", unchanged=name == frozen) for name in task}
    back = TaskVector(task.tensors, replace(task.manifest, tensors=entries)).save(tmp_path / "vector")
    assert Term(back, 0.5).factor(frozen) == 0.0
    assert Term(back, 0.5).factor("model.norm.weight") == 0.5
    merge(weights(0), [Term(back)], tmp_path / "out")
    assert torch.equal(read_back(tmp_path / "out")[frozen], weights(0)[frozen])


def test_each_layer_gets_its_own_coefficient_and_what_is_outside_stays(tmp_path):
    onto, task = weights(0), weights(1)
    instruction = weights(2)
    # The first block is the better aligned one, so linear weighting gives it 1/2 and the other 1.
    for name in task:
        if name.startswith(BLOCKS[0]):
            task[name] *= 0.01
    merge(onto, [Term(weighted(vector(task), vector(instruction)), 2.0)], tmp_path / "out")
    found = read_back(tmp_path / "out")
    for name in onto:
        factor = 1.0 if name.startswith(BLOCKS[0]) else 2.0 if name.startswith(BLOCKS[1]) else 0.0
        assert torch.equal(found[name], torch.from_numpy(summed(onto[name], (task[name], factor))).float())


def test_the_coefficient_outside_the_layers_reaches_embeddings_norm_and_head(tmp_path):
    onto, task = weights(0), weights(1)
    merge(onto, [Term(weighted(vector(task), vector(weights(2)), "threshold", threshold=-1, outside=0.5))], tmp_path / "out")
    found = read_back(tmp_path / "out")
    for name in onto:
        factor = 0.0 if name.startswith("model.layers") else 0.5
        assert torch.equal(found[name], torch.from_numpy(summed(onto[name], (task[name], factor))).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1e3])
def test_apply_and_negate_in_one_plan_gives_onto_back_to_the_last_bit(tmp_path, dtype, scale):
    onto, task = weights(0, dtype=dtype), vector(weights(1, spread=7.0))
    onto["model.norm.weight"][0] = -0.0
    merge(onto, [Term(task, scale), Term(task, -scale)], tmp_path / "out")
    assert same_bits(read_back(tmp_path / "out"), onto)


def exactly_held(start, tuned):
    """Where float32 holds tuned − start exactly, decided in float64, which does so for numbers of like size."""
    exact = tuned.double() - start.double()
    return exact.float().double() == exact


def test_apply_then_forget_returns_the_start_wherever_float32_holds_the_difference(tmp_path):
    start = weights(0, width=32)
    tuned = plus(start, weights(1, width=32), 0.05)
    task = TaskVector.between(start, tuned)
    merge(start, [Term(task)], tmp_path / "there")
    forget(tmp_path / "there", Term(task), tmp_path / "back")
    there, back = read_back(tmp_path / "there"), read_back(tmp_path / "back")
    share = []
    for name in start:
        exact = exactly_held(start[name], tuned[name])
        share.append(exact.float().mean().item())
        assert torch.equal(there[name][exact], tuned[name][exact])
        assert torch.equal(back[name][exact], start[name][exact])
    assert min(share) > 0.5, "the law must not be tested on nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_then_forget_returns_the_start_everywhere_on_a_dyadic_grid(tmp_path, dtype):
    # Multiples of a power of two, small enough for every sum to be one too: nothing is ever rounded.
    grid = GRID if dtype == torch.float32 else 1 / 16
    start = weights(0, width=16, step=grid, dtype=dtype)
    task = vector(weights(1, width=16, step=grid, spread=0.3))
    start = {name: tensor.clamp(-4, 4) for name, tensor in start.items()}
    merge(start, [Term(task)], tmp_path / "there")
    forget(tmp_path / "there", Term(task), tmp_path / "back")
    assert not same_bits(read_back(tmp_path / "there"), start)
    back = read_back(tmp_path / "back")
    assert all(torch.equal(back[name], start[name]) for name in start)


def test_two_vectors_are_summed_before_they_are_rounded(tmp_path):
    # Each alone is half a unit of the last place of 1.0 and would be lost; together they are one unit.
    onto = {"w": torch.tensor([1.0])}
    half_a_unit = vector({"w": torch.tensor([2.0**-24])})
    merge(onto, [Term(half_a_unit), Term(half_a_unit)], tmp_path / "out")
    assert read_back(tmp_path / "out")["w"].item() == 1 + 2**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_results_are_the_float64_answer_correctly_rounded(tmp_path, dtype):
    onto, one, other = weights(0, width=24, dtype=dtype), weights(1, width=24, spread=0.1), weights(2, width=24, spread=0.1)
    merge(onto, [Term(vector(one), 0.37), Term(vector(other), 0.5)], tmp_path / "out")
    found = read_back(tmp_path / "out")
    for name in onto:
        expected = nearest(summed(onto[name], (one[name], 0.37), (other[name], 0.5)), dtype)
        assert torch.equal(found[name].double(), expected)


def test_forgetting_is_merging_with_the_opposite_scale(tmp_path):
    task = weighted(vector(weights(1)), vector(weights(2)))
    forget(weights(0), Term(task, 0.6), tmp_path / "forgotten")
    merge(weights(0), [Term(task, -0.6)], tmp_path / "merged")
    assert same_bits(read_back(tmp_path / "forgotten"), read_back(tmp_path / "merged"))
    assert json.loads((tmp_path / "forgotten" / "merge.json").read_text())["terms"][0]["scale"] == -0.6


def test_merging_a_pure_vector_agrees_with_merging_by_coefficients(tmp_path):
    onto, task = weights(0), weighted(vector(weights(1)), vector(weights(2)))
    merge(onto, [Term(task, 0.8)], tmp_path / "by coefficient")
    merge(onto, [Term(task.pure(), 0.8)], tmp_path / "pure")
    one, other = read_back(tmp_path / "by coefficient"), read_back(tmp_path / "pure")
    # The pure vector is rounded to float32 once more.
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=2**-22) for name in one)


def test_a_vector_from_base_merges_once_the_instruction_vector_is_taken_off(tmp_path):
    base = weights(0, step=GRID)
    instruct = plus(base, weights(1, step=GRID, spread=0.1))
    tuned = plus(instruct, weights(2, step=GRID, spread=0.1))
    instruction = TaskVector.between(base, instruct, kind="instruction")
    from_base = TaskVector.between(base, tuned, start_kind="base")
    ready = from_base.weighted(align(from_base, instruction), "linear").without(instruction)
    direct = TaskVector.between(instruct, tuned)
    direct = direct.weighted(align(direct, instruction), "linear")
    merge(instruct, [Term(ready)], tmp_path / "by way of base")
    merge(instruct, [Term(direct)], tmp_path / "direct")
    assert same_bits(read_back(tmp_path / "by way of base"), read_back(tmp_path / "direct"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_changes_neither_the_weights_nor_the_vector(tmp_path, dtype):
    onto, task = weights(0, dtype=dtype), weights(1, dtype=dtype)
    merge(onto, [Term(vector(task), 0.3)], tmp_path / "out")
    assert same_bits(onto, weights(0, dtype=dtype))
    assert same_bits(task, weights(1, dtype=dtype))
    weight, difference = torch.ones(3, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)
    combine(weight, [(difference, 0.3)], dtype)
    assert weight.tolist() == [1.0] * 3
    assert difference.tolist() == [2.0] * 3


# Files


def test_a_sharded_model_merges_into_shards_with_an_index(tmp_path):
    onto, task = weights(0), weights(1)
    write_model(tmp_path / "onto", onto, shards=3)
    merge(tmp_path / "onto", [Term(vector(task))], tmp_path / "out", max_shard_bytes=200)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" for index in range(len(files))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in onto.values())
    assert {name: name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items()} == dict.fromkeys(onto, True)
    merge(onto, [Term(vector(task))], tmp_path / "whole")
    assert same_bits(read_back(tmp_path / "out"), read_back(tmp_path / "whole"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_loads_with_transformers(tmp_path, tied, dtype):
    from transformers import AutoModelForCausalLM

    llama(0, tied=tied, dtype=dtype).save_pretrained(tmp_path / "start")
    llama(1, tied=tied, dtype=dtype).save_pretrained(tmp_path / "tuned")
    task = TaskVector.between(tmp_path / "start", tmp_path / "tuned")
    merge(tmp_path / "start", [Term(task)], tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == dtype
    # tuned = start + (tuned − start): exact here up to one rounding.
    for name, expected in llama(1, tied=tied, dtype=dtype).state_dict().items():
        assert torch.allclose(model.state_dict()[name], expected, rtol=0, atol=2**-24 if dtype == torch.float32 else 0)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_casting_the_output_writes_the_dtype_into_its_config(tmp_path):
    write_model(tmp_path / "onto", weights(0), config={"torch_dtype": "float32", "hidden_size": 4})
    merge(tmp_path / "onto", [Term(vector(weights(1)))], tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "made-up", "hidden_size": 4, "dtype": "bfloat16"}
    assert {tensor.dtype for tensor in read_back(tmp_path / "out").values()} == {torch.bfloat16}
    merge(tmp_path / "onto", [Term(vector(weights(1)))], tmp_path / "as it was")
    assert json.loads((tmp_path / "as it was" / "config.json").read_text())["torch_dtype"] == "float32"
    assert {tensor.dtype for tensor in read_back(tmp_path / "as it was").values()} == {torch.float32}


def test_each_tensor_keeps_its_own_dtype_by_default(tmp_path):
    onto = {
        "model.layers.0.w": torch.ones(2, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(2),
        "x": torch.ones(2, dtype=torch.float64),
    }
    merge(onto, [Term(vector(plus(onto, onto)))], tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in read_back(tmp_path / "out").items()} == {
        name: tensor.dtype for name, tensor in onto.items()
    }


def test_small_files_come_along_and_weights_cards_and_records_do_not(tmp_path):
    onto = write_model(tmp_path / "onto", weights(0), shards=2)
    for name in ("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "modeling_own.py", "vocab.tiktoken"):
        (onto / name).write_text(name)
    for name in ("README.md", "merge.json", "pytorch_model.bin", "training_args.pt", "pytorch_model.bin.index.json"):
        (onto / name).write_text("old")
    (onto / "checkpoint.json").mkdir()
    merge(onto, [Term(vector(weights(1)))], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "merge.json",
        "merges.txt",
        "model.safetensors",
        "modeling_own.py",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.tiktoken",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert "old" not in (tmp_path / "out" / "README.md").read_text()


def test_a_lightning_checkpoint_serves_as_onto_and_as_either_side(tmp_path):
    start, tuned = weights(0), weights(1)
    write_model(tmp_path / "start", start)
    write_model(tmp_path / "tuned", tuned)
    write_checkpoint(tmp_path / "start.ckpt", start)
    write_checkpoint(tmp_path / "tuned.ckpt", tuned, **{"metric.total": torch.tensor(3.0), "teacher.weight": torch.ones(2)})
    merge(tmp_path / "start", [Term(TaskVector.between(tmp_path / "start", tmp_path / "tuned"), 0.5)], tmp_path / "directories")
    expected = read_back(tmp_path / "directories")
    assert set(expected) == set(start)
    merge(tmp_path / "start", [Term(TaskVector.between(tmp_path / "start", tmp_path / "tuned.ckpt"), 0.5)], tmp_path / "tuned as ckpt")
    merge(tmp_path / "start", [Term(TaskVector.between(tmp_path / "start.ckpt", tmp_path / "tuned"), 0.5)], tmp_path / "start as ckpt")
    merge(tmp_path / "start.ckpt", [Term(TaskVector.between(tmp_path / "start", tmp_path / "tuned"), 0.5)], tmp_path / "onto as ckpt")
    for name in ("tuned as ckpt", "start as ckpt", "onto as ckpt"):
        assert same_bits(read_back(tmp_path / name), expected), name


@pytest.mark.parametrize("onto_twice", [False, True])
@pytest.mark.parametrize("start_twice", [False, True])
@pytest.mark.parametrize("tuned_twice", [False, True])
def test_tied_weights_count_once_however_often_each_directory_stores_them(tmp_path, onto_twice, start_twice, tuned_twice):
    config = {"tie_word_embeddings": True}
    for name, seed, twice in (("onto", 0, onto_twice), ("start", 1, start_twice), ("tuned", 2, tuned_twice)):
        write_model(tmp_path / name, tied_to_embedding(weights(seed), twice=twice), config=config)
    task = TaskVector.between(tmp_path / "start", tmp_path / "tuned").save(tmp_path / "vector")
    merge(tmp_path / "onto", [Term(task)], tmp_path / "out")
    found, delta = read_back(tmp_path / "out"), TaskVector.between(weights(1), weights(2))
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], (weights(0)[name].double() + delta[name].double()).float())
    if "lm_head.weight" in found:
        assert torch.equal(found["lm_head.weight"], found[name])


def test_tied_weights_in_memory_count_once(tmp_path):
    start, tuned = llama(0, tied=True), llama(1, tied=True)
    start.save_pretrained(tmp_path / "start")
    task = TaskVector.between(tmp_path / "start", tuned)
    assert "lm_head.weight" not in task
    merge(start, [Term(task)], tmp_path / "out")
    assert set(read_back(tmp_path / "out")) == set(load_file(tmp_path / "start" / "model.safetensors"))
    write_checkpoint(tmp_path / "tuned.ckpt", tuned.state_dict())
    from_checkpoint = TaskVector.between(tmp_path / "start", tmp_path / "tuned.ckpt")
    assert same_bits(dict(from_checkpoint), dict(task))


def test_heads_that_are_no_copy_of_the_embedding_are_not_taken_for_one(tmp_path):
    config = {"tie_word_embeddings": True}
    write_model(tmp_path / "start", tied_to_embedding(weights(0), twice=False), config=config)
    write_model(tmp_path / "tuned", weights(1), config=config)
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        TaskVector.between(tmp_path / "start", tmp_path / "tuned")


def test_integer_tensors_are_copied_as_they_are(tmp_path):
    onto = weights(0) | {"steps": torch.tensor(7), "mask": torch.tensor([True, False]), "table": torch.arange(5, dtype=torch.int16)}
    write_model(tmp_path / "onto", onto)
    merge(tmp_path / "onto", [Term(vector(weights(1)))], tmp_path / "out", dtype="bfloat16")
    found = read_back(tmp_path / "out")
    for name in ("steps", "mask", "table"):
        assert found[name].dtype == onto[name].dtype
        assert torch.equal(found[name], onto[name])


# The record


def test_the_record_tells_what_was_merged_and_how(tmp_path):
    write_model(tmp_path / "instruct", weights(0))
    write_model(tmp_path / "tuned", weights(1))
    task = TaskVector.between(tmp_path / "instruct", tmp_path / "tuned").save(tmp_path / "vector")
    task = weighted(task, vector(weights(2)), "threshold", threshold=0.25, outside=0.5)
    merge(tmp_path / "instruct", [Term(task, 0.75), Term(vector(weights(3)))], tmp_path / "out", command="lata merge …")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["onto"]["location"] == str(tmp_path / "instruct")
    assert record["onto"]["content_hash"] == task.manifest.start_identity.content_hash
    assert record["command"] == "lata merge …"
    first, second = record["terms"]
    assert first["vector"] == str(tmp_path / "vector")
    assert (first["scale"], first["weighting"], first["threshold"], first["level"], first["outside"]) == (
        0.75,
        "threshold",
        0.25,
        "block",
        0.5,
    )
    assert first["coefficients"] == task.manifest.coefficients
    assert first["start"]["location"] == str(tmp_path / "instruct")
    assert first["tuned"]["location"] == str(tmp_path / "tuned")
    assert (second["scale"], second["threshold"], second["coefficients"], second["outside"]) == (1.0, None, None, 1.0)
    assert set(record["tensors"]) == set(weights(0))
    assert record["versions"]["torch"] == torch.__version__
    # The output is a start for the next merge, under the hash that the record gives it.
    again = TaskVector.between(tmp_path / "out", tmp_path / "tuned").save(tmp_path / "again")
    assert again.manifest.start_identity.content_hash == record["content_hash"]


def test_the_card_is_yaml_a_hub_accepts_and_names_onto_scale_and_command(tmp_path):
    import yaml

    onto = write_model(tmp_path / 'a "quoted": path', weights(0))
    merge(onto, [Term(vector(weights(1)), 0.75)], tmp_path / "out", command="lata merge --scale 0.75")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": [str(onto)],
        "tags": ["merge", "task-arithmetic", "lata"],
    }
    assert "# out" in text
    assert "| 0.75 | none | 1 |" in text
    assert "lata merge --scale 0.75" in text


def test_progress_is_told_after_every_tensor_in_bytes(tmp_path):
    seen = []
    merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out", progress=lambda written, size: seen.append((written, size)))
    size = sum(4 * tensor.numel() for tensor in weights().values())
    assert [entry[1] for entry in seen] == [size] * len(weights())
    assert seen[-1][0] == size
    assert [entry[0] for entry in seen] == sorted({entry[0] for entry in seen})


# Refusals


def test_a_plan_without_vectors_is_refused(tmp_path):
    with pytest.raises(LataError, match="nothing to merge: give at least one vector"):
        merge(weights(0), [], tmp_path / "out")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(LataError, match="scale of the weights in memory .* must be a finite number"):
        Term(vector(weights(1)), scale)


def test_coefficients_on_a_vector_from_base_need_the_instruction_vector():
    task = weighted(vector(weights(1), start_kind="base"), vector(weights(2)))
    with pytest.raises(LataError, match=r"started from base.*without\(instruction_vector\)"):
        Term(task)


def test_an_unknown_dtype_is_refused_with_the_choices(tmp_path):
    with pytest.raises(LataError, match="unknown dtype 'int8'; choose one of float32, bfloat16, float16"):
        merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out", dtype="int8")


def test_an_output_that_exists_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/theirs").write_text("")
    with pytest.raises(OutputError, match="out exists already"):
        merge(tmp_path / "no such model", [Term(vector(weights(1)))], tmp_path / "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="dangling exists already"):
        merge(weights(0), [Term(vector(weights(1)))], tmp_path / "dangling")


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out cannot be written: File exists"):
        merge(weights(0), [Term(vector(weights(1)))], tmp_path / "file" / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_with_tensor_and_sources(tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    onto, task = weights(0), weights(1)
    onto[name][0, 0] = value
    write_model(tmp_path / "onto", onto)
    with pytest.raises(CorruptFileError, match=f"{name}: NaN or infinite values in one of {tmp_path}/onto, the weights in memory"):
        merge(tmp_path / "onto", [Term(vector(task))], tmp_path / "out")
    task[name][0, 0] = value
    with pytest.raises(CorruptFileError, match=f"{name}: NaN or infinite"):
        merge(weights(0), [Term(vector(task))], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["onto"]


def test_a_result_that_does_not_fit_the_dtype_is_refused(tmp_path):
    onto, task = {"w": torch.tensor([60000.0])}, vector({"w": torch.tensor([10000.0])})
    with pytest.raises(CorruptFileError, match="w: values too large for torch.float16"):
        merge(onto, [Term(task)], tmp_path / "out", dtype="float16")
    merge(onto, [Term(task)], tmp_path / "out", dtype="bfloat16")


def test_another_vocabulary_is_refused_in_these_words(tmp_path):
    with pytest.raises(
        LayoutMismatchError, match=r"same vocabulary; model.embed_tokens.weight has 6 rows in one and 9 in the other. Resize"
    ):
        merge(weights(0), [Term(vector(weights(1, vocabulary=9)))], tmp_path / "out")


def test_another_width_is_refused_with_both_shapes(tmp_path):
    with pytest.raises(LayoutMismatchError, match=r"must have the same shapes; 9 of \d+ tensors differ, first: .*\(6, 4\) and \(6, 8\)"):
        merge(weights(0), [Term(vector(weights(1, width=8)))], tmp_path / "out")


def test_another_architecture_is_refused_with_the_first_names(tmp_path):
    other = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in weights(1).items()}
    with pytest.raises(LayoutMismatchError, match=r"same tensors; on one side only are 12: .*…\]. Are both of one architecture"):
        merge(weights(0), [Term(vector(other))], tmp_path / "out")
    fewer = {name: tensor for name, tensor in weights(1).items() if not name.startswith(BLOCKS[1])}
    with pytest.raises(LayoutMismatchError, match="on one side only are 3"):
        merge(weights(0), [Term(vector(weights(1))), Term(vector(fewer))], tmp_path / "out")


def test_vectors_from_different_starts_are_refused_unless_told_otherwise(tmp_path):
    one = TaskVector.between(weights(0), weights(1)).save(tmp_path / "one")
    other = TaskVector.between(weights(5), weights(2)).save(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="no common origin"):
        merge(weights(0), [Term(one), Term(other)], tmp_path / "out")
    assert leftovers(tmp_path) == []
    merge(weights(0), [Term(one), Term(other)], tmp_path / "out", check_base=False)


def test_a_task_vector_is_no_model_to_merge_onto(tmp_path):
    vector(weights(1)).save(tmp_path / "vector")
    with pytest.raises(SourceError, match="vector is a task vector, and a model is needed here"):
        merge(tmp_path / "vector", [Term(vector(weights(1)))], tmp_path / "out")


def test_tensors_of_a_kind_no_file_holds_are_refused_by_name(tmp_path):
    onto = weights(0) | {"rotary": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(LataError, match=r"torch.complex64 and the like are in 1: \['rotary'\]"):
        merge(onto, [Term(vector(weights(1)))], tmp_path / "out")
    assert leftovers(tmp_path) == []


# Crashes


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_merge_that_is_interrupted_leaves_nothing_behind(tmp_path, error, after):
    calls = []

    def interrupt(written, size):
        calls.append(written)
        if len(calls) == after:
            raise error

    with pytest.raises(type(error)):
        merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out", progress=interrupt, max_shard_bytes=200)
    assert list(tmp_path.iterdir()) == []
    merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(writer, "tensor_bytes"), (writer.os, "fsync"), (Path, "write_text"), (Path, "rename")])
def test_a_disk_that_fills_up_is_one_clear_error_and_leaves_nothing_behind(tmp_path, monkeypatch, owner, name):
    task = vector(weights(1))
    monkeypatch.setattr(owner, name, full_disk)
    with pytest.raises(OutputError, match="disk is full while writing .*out.*nothing was left behind"):
        merge(weights(0), [Term(task)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"needs 528 bytes and the disk has 10 left"):
        merge({"w": torch.zeros(132)}, [Term(vector({"w": torch.ones(132)}))], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX")
def test_a_write_that_the_system_cuts_off_is_one_clear_error_and_leaves_nothing_behind(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match="out cannot be written: File too large"):
            merge({"w": torch.zeros(8000)}, [Term(vector({"w": torch.ones(8000)}))], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_killed_leaves_nothing_under_the_final_name(tmp_path):
    script = """
        import os, signal, sys, torch
        from pathlib import Path
        from lata_lightning.merging.merge import Term, merge
        from lata_lightning.vectors.task_vector import TaskVector

        start = {f"model.layers.{index}.w": torch.zeros(8) for index in range(4)}
        tuned = {name: torch.ones(8) for name in start}

        def kill(written, size):
            if written > size / 2:
                os.kill(os.getpid(), signal.SIGKILL)

        merge(start, [Term(TaskVector.between(start, tuned))], Path(sys.argv[1]) / "out", progress=kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    # What a killed process cannot clear away does not carry the final name, and does not stand in the way of a second attempt.
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(".out.partial-") for name in leftovers(tmp_path))
    merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out")
    assert same_bits(read_back(tmp_path / "out"), plus(weights(0), weights(1)))


def test_an_output_that_someone_else_makes_meanwhile_is_not_overwritten(tmp_path):
    def meddle(written, size):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("kept")

    with pytest.raises(OutputError, match="exists already"):
        merge(weights(0), [Term(vector(weights(1)))], tmp_path / "out", progress=meddle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "theirs").read_text() == "kept"
