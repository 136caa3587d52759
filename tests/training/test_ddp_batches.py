"""Two processes share out what one would see, without a trainer's option for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ddp_batches_run import PAIRS, data_modules

from lata_lightning.training.batches import MixtureBatchSampler


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What each process saw of each data module."""
    directory = tmp_path_factory.mktemp("ddp")
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in PAIRS[:24]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(directory / "cache")}
    script = Path(__file__).with_name("ddp_batches_run.py")
    done = subprocess.run([sys.executable, script, rows, directory], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def seen(output, name, epoch):
    """The batches of an epoch, by process."""
    found = [json.loads((output / f"{name}{rank}.json").read_text()) for rank in range(2)]
    return [[batch for number, batch in batches if number == epoch] for batches in found]


@pytest.mark.parametrize("name", ["mixture", "raw", "rows", "stream"])
def test_processes_see_different_batches_equally_many_and_new_ones_every_epoch(output, name):
    one, other = seen(output, name, 0)
    assert len(one) == len(other) == 6
    assert not any(batch in other for batch in one)
    assert seen(output, name, 1) != [one, other]


@pytest.mark.parametrize("name", ["mixture", "raw"])
def test_two_processes_together_see_what_one_would_see_in_as_many_batches(output, name):
    data = data_modules("unused")[name]
    data.batches_per_epoch = 12
    data.setup("fit")
    alone = [batch["input_ids"].tolist() for batch in data.train_dataloader()]
    one, other = seen(output, name, 0)
    assert [batch for pair in zip(one, other, strict=True) for batch in pair] == alone


@pytest.mark.parametrize("name", ["rows", "stream"])
def test_two_processes_see_every_row_once_an_epoch(output, name):
    rows = [tuple(token for token in row if token != 257) for batches in seen(output, name, 0) for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 24


def test_the_share_of_raw_batches_is_the_same_for_all_processes_together():
    kinds = [
        [
            batch[0] >= 10
            for batch in MixtureBatchSampler([range(10)], [1.0], range(10, 90), 0.25, 2, 2, 8, seed=0, num_replicas=2, rank=rank)
        ]
        for rank in range(2)
    ]
    assert sum(kinds[0]) + sum(kinds[1]) == 4
