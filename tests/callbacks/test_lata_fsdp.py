"""FSDP2 on two CPU processes: what is measured on shards is what whole tensors would give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_models import make_models

from lata_lightning import TaskVector, align

# Not divisible by two: vocabulary, width of the MLP.
UNEVEN = {"vocab_size": 33, "intermediate_size": 25}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), **UNEVEN)


def run(models, output, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output.mkdir(exist_ok=True)
    options = json.dumps({"models": str(models), "output": str(output), **options})
    command = [sys.executable, Path(__file__).with_name("fsdp_run.py"), options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def history(output):
    return [json.loads(line) for line in (output / "lata/history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run of two epochs."""
    output = tmp_path_factory.mktemp("whole")
    run(models, output)
    return output


def check(models, output):
    """What was measured and exported, against whole tensors gathered by the run itself."""
    assert (output / "rank0").read_text() == (output / "rank1").read_text()
    exported, expected = TaskVector.open(output / "lata/task_vector"), TaskVector.between(models / "instruct", output / "tuned.ckpt")
    assert set(exported) == set(expected)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    instruction = TaskVector.open(models / "instruction")
    assert exported.manifest.alignment.values == pytest.approx(align(expected, instruction).values, rel=1e-9)
    assert exported.manifest.start_identity.content_hash == instruction.manifest.tuned_identity.content_hash
    assert [row["step"] for row in history(output)] == [3, 4, 6, 8]


def test_shards_give_the_figures_of_the_whole_tensors_on_both_ranks(models, whole):
    check(models, whole)


def test_replicas_are_counted_once(models, tmp_path):
    run(models, tmp_path, replicated=True, provider="memory")
    check(models, tmp_path)


def test_shards_of_a_mesh_smaller_than_the_world_are_counted_once(models, tmp_path):
    run(models, tmp_path, meshes=2, epochs=1)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    exported, expected = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(models / "instruct", tmp_path / "tuned.ckpt")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    norm = sum(expected[name].double().square().sum().item() for name in expected) ** 0.5
    assert history(tmp_path)[-1]["task_norm"] == pytest.approx(norm, rel=1e-9)
    assert exported.manifest.alignment.values == pytest.approx(align(expected, TaskVector.open(models / "instruction")).values, rel=1e-9)


def test_sharded_training_is_bit_identical_with_and_without_the_callback(models, whole, tmp_path):
    run(models, tmp_path, callback=False)
    with_callback, without = (torch.load(output / "tuned.ckpt", weights_only=True)["state_dict"] for output in (whole, tmp_path))
    assert all(torch.equal(with_callback[name], without[name]) for name in without)


@pytest.mark.parametrize(("provider", "distributed"), [("auto", False), ("memory", True), ("spill", False)])
def test_a_resumed_run_ends_like_the_uninterrupted_one(models, whole, tmp_path, provider, distributed):
    run(models, tmp_path, epochs=1, provider=provider, distributed=distributed)
    run(models, tmp_path, provider=provider, distributed=distributed, resume=str(tmp_path / "kept/epoch=0.ckpt"))
    assert history(tmp_path) == history(whole)
    one, other = (TaskVector.open(output / "lata/task_vector") for output in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
