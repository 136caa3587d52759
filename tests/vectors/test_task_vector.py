import errno
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, leftovers, llama, plus, same_bits, weights, write_checkpoint, write_model

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, OutputError, SourceError, WeightingError
from lata_lightning.store.companions import companions_of
from lata_lightning.store.model_directory import verify_merged
from lata_lightning.store.opening import open_source
from lata_lightning.store.writer import write_json
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import Manifest, library_versions, read_manifest
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector


def vector(tensors, **options):
    return TaskVector.between({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors, **options)


def differences(start, tuned):
    return {name: tuned[name].float() - start[name].float() for name in start}


def weighted(task, rule="linear", **options):
    return task.weighted(align(task, vector(weights(7), kind="instruction"), check_base=False), rule, **options)


@pytest.fixture
def saved(tmp_path):
    return TaskVector.between(weights(0), weights(1)).save(tmp_path / "vector")


def edit(directory, change):
    """Change the manifest of a saved vector."""
    path = directory / "task_vector.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# In memory


def test_a_task_vector_is_a_mapping_to_tuned_minus_start():
    start, tuned = weights(0), weights(1)
    task = TaskVector.between(start, tuned)
    assert same_bits(dict(task), differences(start, tuned))
    assert list(task) == list(start)
    assert len(task) == len(start)
    assert task.shape("lm_head.weight") == (6, 4)
    assert "no such tensor" not in task
    with pytest.raises(KeyError, match="no such tensor"):
        task["no such tensor"]
    assert repr(task) == "TaskVector(the weights in memory − the weights in memory, 9 tensors)"
    assert (task.start, task.manifest.kind, task.unchanged) == ("instruct", "task", frozenset())


def test_an_instruction_vector_counts_from_base():
    assert TaskVector.between(weights(0), weights(1), kind="instruction").start == "base"
    assert TaskVector.between(weights(0), weights(1), start_kind="base").start == "base"


def test_differences_of_half_precision_weights_are_float32_and_of_double_ones_float64():
    half = TaskVector.between(weights(0, dtype=torch.bfloat16), weights(1, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    wide = TaskVector.between(weights(0, dtype=torch.float64), weights(1))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64}


def test_nothing_is_read_before_a_tensor_is_asked_for(tmp_path):
    start, tuned = write_model(tmp_path / "start", weights(0)), write_model(tmp_path / "tuned", weights(1))
    sides = open_source(start), open_source(tuned)
    reads = []
    for side in sides:
        read = side.read
        side.read = lambda name, read=read: (reads.append(name), read(name))[1]
    task = TaskVector.between(*sides)
    assert reads == []
    task["lm_head.weight"]
    assert reads == ["lm_head.weight"] * 2


def test_blocks_are_known_from_module_directory_names_or_rule(tmp_path):
    model = llama(0)
    model.save_pretrained(tmp_path / "start")
    for task in (
        TaskVector.between(model, llama(1)),
        TaskVector.between(tmp_path / "start", llama(1)),
        TaskVector.between(model.state_dict(), llama(1)),
    ):
        assert task.layers.blocks == BLOCKS
        assert task.layers.positions["lm_head.weight"].part == "head"
    by_rule = TaskVector.between(
        {"one.w": torch.ones(1), "two.w": torch.ones(1)}, {"one.w": torch.ones(1), "two.w": torch.ones(1)}, layers=r"^\w+"
    )
    assert by_rule.layers.blocks == ("one", "two")


def test_equal_integer_tensors_are_left_out_and_different_ones_refused():
    steps = {"steps": torch.tensor(3)}
    assert "steps" not in TaskVector.between(weights(0) | steps, weights(1) | steps)
    with pytest.raises(LayoutMismatchError, match="steps holds integers, which must be equal in"):
        TaskVector.between(weights(0) | steps, weights(1) | {"steps": torch.tensor(4)})


def test_an_unknown_start_is_refused():
    with pytest.raises(LataError, match="unknown start 'raw'"):
        TaskVector.between(weights(0), weights(1), start_kind="raw")


# Coefficients


def test_weighting_returns_a_new_vector_over_the_same_tensors():
    task = vector(weights(1))
    found = weighted(task, outside=0.25)
    assert task.manifest.coefficients is None
    assert task.coefficient_of("lm_head.weight") == 1.0
    assert sorted(found.manifest.coefficients.values()) == [0.5, 1.0]
    assert found.coefficient_of("lm_head.weight") == 0.25
    assert {stats.coefficient for stats in found.manifest.alignment.outside.values()} == {0.25}
    assert same_bits(dict(found), dict(task))


@pytest.mark.parametrize("level", ["block", "submodule", "tensor"])
def test_a_tensor_has_the_coefficient_of_its_layer_at_every_level(level):
    task = vector(weights(1))
    found = task.weighted(align(task, vector(weights(7)), level), "linear")
    for layer, names in task.layers.layers(level).items():
        assert {found.coefficient_of(name) for name in names} == {found.manifest.coefficients[layer]}
    assert len(set(found.manifest.coefficients.values())) == {"block": 2, "submodule": 6, "tensor": 6}[level]


def test_the_pure_vector_is_each_layer_times_its_coefficient():
    task = weighted(vector(weights(1)))
    pure = task.pure()
    for name, tensor in weights(1).items():
        assert torch.equal(pure[name], tensor * task.coefficient_of(name))
    assert pure.manifest.coefficients is None
    assert pure.coefficient_of(f"{BLOCKS[0]}.mlp.up_proj.weight") == 1.0
    assert pure.label == f"the pure vector of {task.label}"


def test_a_pure_vector_needs_coefficients_and_a_start_from_instruct():
    with pytest.raises(LataError, match="has no coefficients: measure its alignment and apply a weighting first"):
        vector(weights(1)).pure()
    with pytest.raises(LataError, match=r"started from base, so it contains the instruction vector.*without\(instruction_vector\)"):
        weighted(vector(weights(1), start_kind="base")).pure()


def test_an_unknown_rule_is_refused_when_weighting():
    with pytest.raises(WeightingError, match="unknown weighting 'square'"):
        weighted(vector(weights(1)), "square")


def test_taking_the_instruction_vector_off_leaves_the_task_vector():
    base = weights(0, step=2**-8)
    instruct = plus(base, weights(1, step=2**-8))
    tuned = plus(instruct, weights(2, step=2**-8))
    instruction = TaskVector.between(base, instruct, kind="instruction")
    found = TaskVector.between(base, tuned, start_kind="base").without(instruction)
    assert found.start == "instruct"
    assert same_bits(dict(found), dict(TaskVector.between(instruct, tuned)))


def test_taking_off_keeps_the_coefficients_and_the_identity_of_instruct(tmp_path):
    instruction = TaskVector.between(weights(0), weights(1), kind="instruction").save(tmp_path / "instruction")
    from_base = TaskVector.between(weights(0), weights(2), start_kind="base")
    measured = from_base.weighted(align(from_base, instruction), "log", instruction_vector=instruction)
    left = measured.without(instruction)
    assert left.manifest.coefficients == measured.manifest.coefficients
    assert left.manifest.start_identity == instruction.manifest.tuned_identity
    assert measured.manifest.instruction_identity == (instruction.manifest.start_identity, instruction.manifest.tuned_identity)
    assert dict(left.save(tmp_path / "left").pure()).keys() == weights().keys()


def test_a_tensor_that_was_frozen_on_the_way_from_base_still_has_the_instruction_vector_taken_off(tmp_path):
    # Frozen at its base values, the task vector there is what is missing: minus the instruction vector.
    task, frozen = vector(weights(1), start_kind="base"), "model.norm.weight"
    entries = {name: TensorEntry(task.shape(name), "float32", unchanged=name == frozen) for name in task}
    back = TaskVector(task.tensors, replace(task.manifest, tensors=entries)).save(tmp_path / "vector")
    found = back.without(vector(weights(2), kind="instruction"))
    assert found.unchanged == frozenset()
    assert torch.equal(found[frozen], -weights(2)[frozen])
    assert torch.equal(found.save(tmp_path / "left")[frozen], -weights(2)[frozen])


def test_an_identity_that_is_known_already_is_kept(tmp_path):
    task = vector(weights(1))
    known = Identity("org/start", "0123abc", "blake3:known")
    back = TaskVector(task.tensors, replace(task.manifest, start_identity=known)).save(tmp_path / "vector")
    assert back.manifest.start_identity == known
    assert back.manifest.tuned_identity.content_hash is not None


def test_only_a_vector_from_base_has_an_instruction_vector_to_take_off():
    with pytest.raises(LataError, match="started from instruct: there is no instruction vector in it"):
        vector(weights(1)).without(vector(weights(2), kind="instruction"))
    short = {name: tensor for name, tensor in weights(2).items() if name != "lm_head.weight"}
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        vector(weights(1), start_kind="base").without(vector(short, kind="instruction"))


# Round trips


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 150])
def test_a_saved_vector_comes_back_bit_for_bit(tmp_path, max_shard_bytes):
    start, tuned = weights(0), weights(1)
    returned = TaskVector.between(start, tuned).save(tmp_path / "vector", max_shard_bytes=max_shard_bytes)
    opened = TaskVector.open(tmp_path / "vector")
    for task in (returned, opened):
        assert same_bits(dict(task), differences(start, tuned))
        assert task.label == str(tmp_path / "vector")
    assert verify(tmp_path / "vector") == len(start)
    names = {path.name for path in (tmp_path / "vector").iterdir()}
    assert {"task_vector.json", "README.md"} <= names
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}
    assert ("delta.safetensors" in names) == (max_shard_bytes > 150)
    assert ("delta.safetensors.index.json" in names) == (max_shard_bytes == 150)


def test_everything_in_the_manifest_survives_the_round_trip(tmp_path):
    write_model(tmp_path / "instruct", weights(0))
    write_model(tmp_path / "tuned", weights(1))
    instruction = vector(weights(7), kind="instruction")
    task = TaskVector.between(tmp_path / "instruct", tmp_path / "tuned")
    task = task.weighted(
        align(task, instruction, "submodule"), "threshold", threshold=0.25, outside=0.5, instruction_vector=instruction
    ).save(tmp_path / "vector")
    manifest = task.manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json(), allow_nan=False))) == manifest
    assert (manifest.level, manifest.weighting, manifest.threshold, manifest.outside) == ("submodule", "threshold", 0.25, 0.5)
    assert manifest.start_identity.location == str(tmp_path / "instruct")
    assert manifest.tensors["lm_head.weight"].shape == (6, 4)
    assert manifest.tensors["lm_head.weight"].dtype == "float32"
    again = TaskVector.open(tmp_path / "vector").save(tmp_path / "again")
    assert again.manifest == manifest
    data = json.loads((tmp_path / "vector" / "task_vector.json").read_text())
    assert (data["format"], data["format_version"]) == ("lata_lightning.task_vector", 3)
    assert data["alignment_too_flat_to_rank"] == manifest.alignment.flat
    assert data["alignment_spread"] == manifest.alignment.spread
    assert data["tensors"]["lm_head.weight"]["part"] == "head"
    assert data["tensors"][f"{BLOCKS[1]}.mlp.up_proj.weight"]["block"] == BLOCKS[1]


def test_step_epoch_and_tied_groups_survive_the_round_trip(tmp_path):
    task = vector(weights(1))
    manifest = replace(task.manifest, step=120, epoch=3, tied=(("lm_head.weight", "model.embed_tokens.weight"),))
    back = TaskVector(task.tensors, manifest).save(tmp_path / "vector").manifest
    assert (back.step, back.epoch, back.tied) == (120, 3, (("lm_head.weight", "model.embed_tokens.weight"),))
    assert "Taken at optimizer step 120, after 3 finished epochs." in (tmp_path / "vector" / "README.md").read_text()


@pytest.mark.parametrize("level", ["block", "submodule", "tensor"])
def test_a_reopened_vector_has_the_same_coefficients_in_the_same_layers(tmp_path, level):
    task = vector(weights(1))
    task = task.weighted(align(task, vector(weights(7)), level), "log", outside=1.0)
    back = task.save(tmp_path / "vector")
    assert back.manifest.coefficients == task.manifest.coefficients
    assert back.layers.layers(level) == task.layers.layers(level)
    assert same_bits(dict(back.pure()), dict(task.pure()))


def test_the_same_weights_are_the_same_start_whatever_they_were_read_from(tmp_path):
    start = {name: tensor.float() for name, tensor in weights(0, dtype=torch.bfloat16).items()}
    starts = {
        "memory": start,
        "directory": write_model(tmp_path / "directory", start),
        "bfloat16": write_model(tmp_path / "bfloat16", weights(0, dtype=torch.bfloat16)),
        "sharded": write_model(tmp_path / "sharded", start, shards=3),
        "checkpoint": write_checkpoint(tmp_path / "start.ckpt", start),
    }
    write_model(tmp_path / "tuned", weights(1))
    found = {
        name: TaskVector.between(source, tmp_path / "tuned").save(tmp_path / f"vector {name}").manifest for name, source in starts.items()
    }
    assert len({manifest.start_identity.content_hash for manifest in found.values()}) == 1
    assert len({manifest.tuned_identity.content_hash for manifest in found.values()}) == 1
    assert found["memory"].start_identity.location is None
    assert found["memory"].start_identity.content_hash != found["memory"].tuned_identity.content_hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_of_a_lower_precision_is_what_numpy_measures(tmp_path, dtype):
    task = weights(1, spread=1e-3)
    if dtype == "float16":
        task[f"{BLOCKS[0]}.mlp.up_proj.weight"] *= 1e-5  # Below half of float16's smallest number for most entries.
    task["lm_head.weight"][0] = 0.0
    back = vector(task).save(tmp_path / "vector", dtype=dtype)
    loss = back.manifest.precision_loss
    full = np.concatenate([tensor.double().numpy().reshape(-1) for tensor in task.values()])
    lower = np.concatenate([tensor.to(getattr(torch, dtype)).double().numpy().reshape(-1) for tensor in task.values()])
    assert loss.zero_fraction == np.count_nonzero((full != 0) & (lower == 0)) / np.count_nonzero(full)
    assert (loss.zero_fraction > 0) == (dtype == "float16")
    assert loss.cosine == pytest.approx(full @ lower / np.linalg.norm(full) / np.linalg.norm(lower), abs=1e-12)
    assert {tensor.dtype for tensor in load_file(tmp_path / "vector" / "delta.safetensors").values()} == {getattr(torch, dtype)}
    assert {entry.dtype for entry in back.manifest.tensors.values()} == {dtype}
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert "Stored below the precision it was measured in" in (tmp_path / "vector" / "README.md").read_text()
    assert verify(tmp_path / "vector") == len(task)


def test_full_precision_has_no_loss_to_tell_of(tmp_path, saved):
    assert saved.manifest.precision_loss is None
    assert "Stored below" not in (tmp_path / "vector" / "README.md").read_text()


def test_a_zero_vector_in_lower_precision_has_no_cosine(tmp_path):
    back = TaskVector.between(weights(0), weights(0)).save(tmp_path / "vector", dtype="bfloat16")
    assert (back.manifest.precision_loss.zero_fraction, back.manifest.precision_loss.cosine) == (0.0, None)
    assert "cosine to the full-precision difference undefined" in (tmp_path / "vector" / "README.md").read_text()


def test_frozen_tensors_take_no_room_and_come_back_as_zeros(tmp_path):
    task = vector(weights(1))
    frozen = "model.embed_tokens.weight"
    entries = {name: TensorEntry(task.shape(name), "float32", unchanged=name == frozen) for name in task}
    known = TaskVector(task.tensors, replace(task.manifest, tensors=entries))
    assert known.unchanged == {frozen}
    back = known.save(tmp_path / "vector")
    with safe_open(tmp_path / "vector" / "delta.safetensors", framework="pt") as file:
        assert frozen not in file.keys()  # noqa: SIM118
    assert torch.equal(back[frozen], torch.zeros(6, 4))
    assert back.manifest.tensors[frozen].hash is None
    assert list(back) == list(task)
    assert verify(tmp_path / "vector") == len(task) - 1
    assert weighted(back).pure().save(tmp_path / "pure").unchanged == {frozen}


def test_a_vector_can_be_saved_again_from_where_it_lies(tmp_path, saved):
    again = saved.save(tmp_path / "again", dtype="bfloat16").save(tmp_path / "third")
    assert same_bits(dict(again), {name: tensor.bfloat16().float() for name, tensor in saved.items()})


# The card


def test_the_card_is_yaml_a_hub_accepts_with_one_row_for_each_layer(tmp_path):
    import yaml

    write_model(tmp_path / "instruct", weights(0))
    task = weighted(TaskVector.between(tmp_path / "instruct", weights(1)))
    task.save(tmp_path / "vector")
    _, front, text = (tmp_path / "vector" / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lata_lightning",
        "base_model": [str(tmp_path / "instruct")],
        "tags": ["task-vector", "task-arithmetic", "lata"],
    }
    assert "not a model" in text
    for block in BLOCKS:
        stats = task.manifest.alignment.layers[block]
        assert f"| {block} | {stats.alignment:.4f} | {stats.relative_norm:.4f} | {stats.coefficient:.4f} |" in text


def test_the_card_of_an_instruction_vector_says_what_it_is(tmp_path):
    vector(weights(1), kind="instruction").save(tmp_path / "vector")
    text = (tmp_path / "vector" / "README.md").read_text()
    assert "An instruction vector (instruct − base)" in text
    assert "base_model" not in text
    assert "| start | in memory | `blake3:" in text


def test_the_card_says_when_the_alignments_are_too_flat_to_rank(tmp_path):
    task = vector({name: torch.ones_like(tensor) for name, tensor in weights().items()})
    flat = task.weighted(align(task, task), "linear")
    flat.save(tmp_path / "flat")
    assert "spread by 0.0000 only: too little to rank the layers by" in (tmp_path / "flat" / "README.md").read_text()
    assert json.loads((tmp_path / "flat" / "task_vector.json").read_text())["alignment_too_flat_to_rank"] is True


def test_an_undefined_alignment_is_a_dash_in_the_card(tmp_path):
    task = vector(weights(1))
    none = task.weighted(align(task, vector({name: torch.zeros_like(tensor) for name, tensor in weights().items()})), "none")
    none.save(tmp_path / "vector")
    assert f"| {BLOCKS[0]} | – | – | 1.0000 |" in (tmp_path / "vector" / "README.md").read_text()


# Refusals


def test_an_output_that_exists_is_refused(tmp_path, saved):
    with pytest.raises(OutputError, match="vector exists already"):
        saved.save(tmp_path / "vector")


def test_an_unknown_dtype_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LataError, match="unknown dtype 'float64'"):
        vector(weights(1)).save(tmp_path / "vector", dtype="float64")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_differences_that_are_not_finite_are_refused_by_name(tmp_path, value):
    tuned = weights(1)
    tuned["model.norm.weight"][1] = value
    with pytest.raises(CorruptFileError, match="model.norm.weight of .* holds NaN or infinite values"):
        TaskVector.between(weights(0), tuned).save(tmp_path / "vector")
    assert list(tmp_path.iterdir()) == []


def test_differences_that_do_not_fit_the_dtype_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(CorruptFileError, match="w of .* does not fit float16; use bfloat16 or float32"):
        vector({"w": torch.tensor([7e4])}).save(tmp_path / "vector", dtype="float16")


def test_a_directory_without_a_manifest_is_no_task_vector(tmp_path):
    write_model(tmp_path / "model", weights())
    with pytest.raises(SourceError, match=r"is no task vector: it holds no task_vector.json. Make one with: lata extract"):
        TaskVector.open(tmp_path / "model")
    with pytest.raises(SourceError, match="is no task vector"):
        TaskVector.open(tmp_path / "nothing")


def test_a_manifest_of_a_newer_version_or_another_format_is_refused(tmp_path, saved):
    edit(tmp_path / "vector", lambda data: data.update(format_version=4))
    with pytest.raises(SourceError, match=r"format version 4, this lata_lightning reads up to 3. Upgrade it"):
        TaskVector.open(tmp_path / "vector")
    edit(tmp_path / "vector", lambda data: data.update(format="safetensors"))
    with pytest.raises(SourceError, match="is of format 'safetensors', expected 'lata_lightning.task_vector'"):
        TaskVector.open(tmp_path / "vector")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("tensors"),
        lambda data: data.pop("format"),
        lambda data: data.update(format_version="two"),
        lambda data: data.update(kind="merge"),
        lambda data: data.update(level="head"),
        lambda data: data["start"].update(kind="raw"),
        lambda data: data["start"].update(surprise=1),
        lambda data: data["weighting"].update(rule="square"),
        lambda data: data.update(tensors=[]),
        lambda data: data.update(blocks=["model.layers.0"]),
        lambda data: data["tensors"]["lm_head.weight"].update(shape=None),
        lambda data: data["tensors"][f"{BLOCKS[0]}.mlp.up_proj.weight"].update(part="fuel"),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0}),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0, BLOCKS[1]: math.nan}),
        lambda data: data.update(coefficients={BLOCKS[0]: 1.0, BLOCKS[1]: "1.0"}),
        lambda data: data.update(coefficients=dict.fromkeys(BLOCKS, 1.0), outside=None),
        lambda data: data.update(alignment={"level": "block"}),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_as_corrupt(tmp_path, saved, change):
    edit(tmp_path / "vector", change)
    with pytest.raises(CorruptFileError, match="task_vector.json is no valid task vector manifest"):
        TaskVector.open(tmp_path / "vector")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused_as_corrupt(tmp_path, saved, text):
    (tmp_path / "vector" / "task_vector.json").write_text(text)
    with pytest.raises(CorruptFileError, match="is no valid task vector manifest"):
        read_manifest(tmp_path / "vector")


def test_tensors_that_are_not_those_of_the_manifest_are_refused(tmp_path, saved):
    file = tmp_path / "vector" / "delta.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.ones(5)}, file)
    with pytest.raises(CorruptFileError, match=r"not those of its manifest; different are 1: \['model.norm.weight'\]"):
        TaskVector.open(tmp_path / "vector")
    save_file({"stranger": torch.ones(1), **tensors}, file)
    with pytest.raises(CorruptFileError, match=r"different are 1: \['stranger'\]"):
        TaskVector.open(tmp_path / "vector")
    file.unlink()
    with pytest.raises(CorruptFileError, match="different are 9"):
        TaskVector.open(tmp_path / "vector")


def test_one_flipped_bit_anywhere_in_the_tensors_is_found(tmp_path, saved):
    file = tmp_path / "vector" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for position in (begin, (begin + len(data)) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CorruptFileError, match=r"is not what was written: other bytes in 1: \['.*'\]. Copy it again"):
            verify(tmp_path / "vector")
    file.write_bytes(data)
    assert verify(tmp_path / "vector") == 9


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_vector_is_refused(tmp_path, saved, keep):
    file = tmp_path / "vector" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match="no readable safetensors file"):
        TaskVector.open(tmp_path / "vector")


def test_a_missing_shard_and_a_foreign_one_are_refused(tmp_path):
    directory = tmp_path / "vector"
    vector(weights(1)).save(directory, max_shard_bytes=150)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CorruptFileError, match=f"lacks files that .* names, 1: .*{re.escape(shard.name)}"):
        TaskVector.open(directory)
    index = directory / "delta.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(CorruptFileError, match="may only name safetensors files beside it"):
        TaskVector.open(directory)


# Verifying merged models


@pytest.fixture
def merged(tmp_path):
    from lata_lightning.merging.merge import Term, merge

    return merge(weights(0), [Term(vector(weights(1)))], tmp_path / "merged")


def test_a_merged_model_is_verified_by_its_record(merged):
    assert verify_merged(merged) == 9
    file = merged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match="is not what was written: different are 1: "):
        verify_merged(merged)
    tensors = weights(0)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(CorruptFileError, match="different are 9"):
        verify_merged(merged)


def test_a_directory_without_a_record_cannot_be_verified(tmp_path):
    with pytest.raises(SourceError, match="holds neither task_vector.json nor merge.json"):
        verify_merged(write_model(tmp_path / "model", weights()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 3}', '{"tensors": ["a"]}'])
def test_a_record_that_is_none_is_refused(merged, text):
    (merged / "merge.json").write_text(text)
    with pytest.raises(CorruptFileError, match="is no merge record|is no JSON|must hold a JSON object"):
        verify_merged(merged)


def test_companions_of_weights_in_memory_are_none(tmp_path):
    companions_of(open_source(weights())).copy_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_versions_of_the_libraries_are_noted_and_missing_ones_left_out(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from lata_lightning.vectors import manifest

    assert library_versions()["torch"] == torch.__version__

    def only_torch(name):
        if name != "torch":
            raise PackageNotFoundError(name)
        return "2.6"

    monkeypatch.setattr(manifest, "version", only_torch)
    assert library_versions() == {"torch": "2.6"}


# Crashes


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()])
def test_a_save_that_is_interrupted_leaves_nothing_behind(tmp_path, error):
    def interrupt(written, size):
        if written > size / 2:
            raise error

    with pytest.raises(type(error)):
        vector(weights(1)).save(tmp_path / "vector", progress=interrupt, max_shard_bytes=150)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["write_manifest", "vector_card", "_write_at"])
def test_a_save_that_fails_at_its_end_leaves_nothing_behind(tmp_path, monkeypatch, name):
    from lata_lightning.store import writer
    from lata_lightning.vectors import artefact

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer if name == "_write_at" else artefact, name, full)
    with pytest.raises(OutputError, match="the disk is full while writing"):
        vector(weights(1)).save(tmp_path / "vector")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_was_interrupted_can_be_repeated(tmp_path):
    with pytest.raises(Stop):
        vector(weights(1)).save(tmp_path / "vector", progress=lambda written, size: (_ for _ in ()).throw(Stop))
    assert leftovers(tmp_path) == []
    assert same_bits(dict(vector(weights(1)).save(tmp_path / "vector")), weights(1))


def test_a_manifest_needs_no_file_to_be_written(tmp_path):
    manifest = vector(weights(1)).manifest
    write_json(tmp_path / "task_vector.json", manifest.to_json())
    assert manifest.to_json()["tensors"] == {}
    assert Identity() == Identity(None, None, None)
