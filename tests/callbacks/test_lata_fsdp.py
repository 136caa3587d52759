"""FSDP2 on two CPU processes: what is measured on shards is what whole tensors would give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_models import shifted, tiny_llama

from lata_lightning import TaskVector, align

# Not divisible by two: vocabulary, width of the MLP.
UNEVEN = {"vocab_size": 33, "intermediate_size": 25}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    base = tiny_llama(**UNEVEN)
    base.save_pretrained(directory / "base")
    shifted(base, 1).save_pretrained(directory / "instruct")
    TaskVector.between(directory / "base", directory / "instruct", kind="instruction").save(directory / "instruction")
    return directory


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("fsdp_run.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def history(output):
    return [json.loads(line) for line in (output / "lata/history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run of two epochs."""
    output = tmp_path_factory.mktemp("whole")
    run(models, output, 2)
    return output


def test_shards_give_the_figures_of_the_whole_tensors_on_both_ranks(models, whole):
    assert (whole / "rank0").read_text() == (whole / "rank1").read_text()
    exported = TaskVector.open(whole / "lata/task_vector")
    expected = TaskVector.between(models / "instruct", whole / "tuned.ckpt")
    assert set(exported) == set(expected)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    measured = align(expected, TaskVector.open(models / "instruction"))
    assert exported.manifest.alignment.values == pytest.approx(measured.values, rel=1e-9)
    assert exported.manifest.start_identity.content_hash == TaskVector.open(models / "instruction").manifest.tuned_identity.content_hash
    assert [row["step"] for row in history(whole)] == [3, 4, 6, 8]


@pytest.mark.parametrize("provider", ["auto", "memory", "spill"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(models, whole, tmp_path, provider):
    run(models, tmp_path, 1, "none", provider)
    run(models, tmp_path, 2, tmp_path / "kept/epoch=0.ckpt", provider)
    assert history(tmp_path) == history(whole)
    one, other = (TaskVector.open(output / "lata/task_vector") for output in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
