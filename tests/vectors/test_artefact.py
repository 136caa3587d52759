import errno
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_vectors import differences, vector, weighted
from tiny_models import BLOCKS, leftovers, same_bits, weights, write_checkpoint, write_model

from lata_lightning.errors import CorruptFileError, LataError, OutputError
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector


@pytest.fixture
def saved(tmp_path):
    return TaskVector.between(weights(0), weights(1)).save(tmp_path / "vector")


def test_an_identity_that_is_known_already_is_kept(tmp_path):
    task = vector(weights(1))
    known = Identity("org/start", "0123abc", "blake3:known")
    back = TaskVector(task.tensors, replace(task.manifest, start_identity=known)).save(tmp_path / "vector")
    assert back.manifest.start_identity == known
    assert back.manifest.tuned_identity.content_hash is not None


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


def test_tensors_that_are_not_those_of_the_manifest_are_refused(tmp_path, saved):
    file = tmp_path / "vector" / "delta.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.ones(5)}, file)
    with pytest.raises(CorruptFileError, match=r"not those of its manifest; 1 of \d+ tensors differs: \['model.norm.weight'\]"):
        TaskVector.open(tmp_path / "vector")
    save_file({"stranger": torch.ones(1), **tensors}, file)
    with pytest.raises(CorruptFileError, match=r"1 of \d+ tensors differs: \['stranger'\]"):
        TaskVector.open(tmp_path / "vector")
    file.unlink()
    with pytest.raises(CorruptFileError, match=r"9 of \d+ tensors differ, first: "):
        TaskVector.open(tmp_path / "vector")


def test_one_flipped_bit_anywhere_in_the_tensors_is_found(tmp_path, saved):
    file = tmp_path / "vector" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for position in (begin, (begin + len(data)) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CorruptFileError, match=r"does not match its record: 1 of \d+ tensors differs: \['.*'\]. Copy it again"):
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
    with pytest.raises(CorruptFileError, match="may only name safetensors files in its directory"):
        TaskVector.open(directory)


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
