"""Files of every format, damaged at random: each ends in a LataError or in tensors, whatever the damage.

LATA_DAMAGED_FILES sets how many are tried of each format; by default few, so that the suite stays quick.
"""

import os
import random
import resource
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tiny_models import weights, write_model

from lata_lightning import TaskVector
from lata_lightning.errors import LataError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe

COUNT = int(os.environ.get("LATA_DAMAGED_FILES", "40"))
MEMORY = 1 << 30


def damaged(data, chance):
    """Bytes after one to three accidents: flipped, cut off, removed, repeated, overwritten, or with a number made vast."""
    data = bytearray(data)
    # Half of all accidents happen in the first part, where headers are.
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if not data:
            break
        reach = len(data) if chance.random() < 0.5 else min(len(data), 400)
        at = chance.randrange(reach)
        length = chance.choice([1, 1, 2, 8, 50])
        match chance.randrange(7):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = chance.randbytes(length)
            case 5:
                data[at : at + 8] = b"\xff" * chance.choice([4, 8])
            case 6:
                digits = [place for place, byte in enumerate(data[:400]) if 48 <= byte < 58]
                if digits:
                    place = chance.choice(digits)
                    data[place : place + 1] = str(chance.choice([0, 2**31, 2**63, 10**30])).encode()
    return bytes(data)


def safetensors_file(directory):
    save_file(weights(), directory / "m.safetensors")
    return directory / "m.safetensors", ["m.safetensors"]


def index(directory):
    write_model(directory / "m", weights(), shards=3)
    return directory / "m", ["m/model.safetensors.index.json", "m/config.json", "m/model-00002-of-00003.safetensors"]


def checkpoint(directory):
    torch.save({"state_dict": weights(), "hyper_parameters": {"x": [1, "y", None]}}, directory / "last.ckpt")
    return directory / "last.ckpt", ["last.ckpt"]


def legacy(directory):
    torch.save(weights(), directory / "old.bin", _use_new_zipfile_serialization=False)
    return directory / "old.bin", ["old.bin"]


def pickled_directory(directory):
    (directory / "m").mkdir()
    torch.save(weights(), directory / "m/pytorch_model.bin")
    return directory / "m", ["m/pytorch_model.bin"]


def sharded(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights()}, checkpoint_id=directory / "d")
    return directory / "d", ["d/.metadata", "d/__0_0.distcp"]


def vector(directory):
    TaskVector.between(weights(0), weights(1)).save(directory / "v")
    return directory / "v", ["v/task_vector.json", "v/delta.safetensors"]


KINDS = [safetensors_file, index, checkpoint, legacy, pickled_directory, sharded, vector]


def read_all(path, kind):
    if kind is vector:
        opened = TaskVector.open(path)
        for name in opened:
            opened[name]
        return
    source = open_source(path)
    for name in source.names:
        assert tuple(source.read(name).shape) == source.shape(name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_file_ends_in_an_error_of_ours_or_is_read(tmp_path, kind):
    path, files = kind(tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in files}
    chance = random.Random(kind.__name__)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(COUNT):
        file = chance.choice(files)
        (tmp_path / file).write_bytes(damaged(whole[file], chance))
        for look in (lambda: read_all(path, kind), lambda: describe(path)):
            try:
                look()
            except LataError:
                refused += 1
            except BaseException:
                shutil.copy(tmp_path / file, tmp_path / "failed")
                print(f"damaged file number {number}: {file}")  # noqa: T201
                raise
        (tmp_path / file).write_bytes(whole[file])
    assert refused > 0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    read_all(path, kind)
