import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import same_bits, weights
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe


def contents(source):
    return {name: source.read(name) for name in source.names}


def saved(path, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=path)
    return path


def written(directory, chunks, size, dtype=torch.float32, *, change=lambda metadata: None):
    """A checkpoint of one tensor in chunks (offsets and values), each in a file of its own, as several processes write it."""
    directory.mkdir()
    stored = {}
    for number, (offsets, values) in enumerate(chunks):
        torch.save(values, directory / f"__{number}_0.distcp")
        info = torch.distributed.checkpoint.filesystem._StorageInfo(
            f"__{number}_0.distcp", 0, (directory / f"__{number}_0.distcp").stat().st_size
        )
        stored[MetadataIndex("state_dict.w", torch.Size(offsets), number)] = info
    parts = [ChunkStorageMetadata(torch.Size(offsets), values.shape) for offsets, values in chunks]
    metadata = Metadata(
        {"state_dict.w": TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), parts), "epoch": BytesStorageMetadata()},
        {"state_dict.w": ("state_dict", "w"), "epoch": ("epoch",)},
        stored,
    )
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def pieces(source, name, step):
    load, count = source.chunks(name), source.read(name).numel()
    return torch.cat([load(begin, min(begin + step, count)).clone() for begin in range(0, count, step)])


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "app"])
def test_what_dcp_saves_is_read_without_a_process_group(tmp_path, key):
    optimizer = {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    path = saved(tmp_path / "last.ckpt", {key: weights(), "optimizer_0": optimizer, "epoch": 3})
    torch.save({"epoch": 3}, path / "meta.pt")
    source = open_source(path)
    assert same_bits(contents(source), weights())
    assert source.location == str(path)
    facts = describe(path)
    assert facts["format"] == "sharded checkpoint directory (torch.distributed.checkpoint), 1 files"
    assert facts["tensors"] == len(weights())


def test_a_bare_state_dict_and_two_models_are_told_apart(tmp_path):
    assert same_bits(contents(open_source(saved(tmp_path / "bare", weights()))), weights())
    both = saved(tmp_path / "both", {"model": weights(0), "ema": weights(1)})
    with pytest.raises(SourceError, match="must hold the model once"):
        open_source(both)
    assert same_bits(contents(open_source(both, "ema")), weights(1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_every_dtype_is_read_as_it_was_saved(tmp_path, dtype):
    tensors = {
        "model": {"w": torch.tensor([[0, 1], [1, 0]]).to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.empty(0, 2).to(dtype)}
    }
    assert same_bits(contents(open_source(saved(tmp_path / "d", tensors))), tensors["model"])


WHOLE = torch.arange(42.0).reshape(6, 7)


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 6, 0, 7)], [(0, 4, 0, 7), (4, 6, 0, 7)], [(4, 6, 0, 7), (0, 4, 0, 7)], [(0, 6, 0, 3), (0, 6, 3, 7)],
        [(0, 3, 0, 3), (0, 3, 3, 7), (3, 6, 0, 3), (3, 6, 3, 7)], [(0, 2, 0, 7), (2, 6, 0, 3), (2, 6, 3, 7)],
    ],
    ids=["whole", "rows", "rows backwards", "columns", "both", "uneven"],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 5, 100])
def test_chunks_of_several_processes_are_put_together(tmp_path, cuts, step):
    chunks = [((top, left), WHOLE[top:bottom, left:right].clone()) for top, bottom, left, right in cuts]
    source = open_source(written(tmp_path / "c", chunks, (6, 7)))
    assert source.names == ("w",)
    assert torch.equal(source.read("w"), WHOLE)
    assert torch.equal(source.read_slice("w", (slice(1, 3), slice(0, 7))), WHOLE[1:3])
    assert torch.equal(pieces(source, "w", step), WHOLE.reshape(-1))


def test_an_empty_chunk_of_a_process_that_owns_nothing_is_passed_over(tmp_path):
    source = open_source(written(tmp_path / "c", [((0, 0), WHOLE), ((6, 0), WHOLE[6:])], (6, 7)))
    assert torch.equal(source.read("w"), WHOLE)


def bent(**changes):
    def change(metadata):
        for path, value in changes.items():
            if path == "file":
                next(iter(metadata.storage_data.values())).relative_path = value
            elif path == "length":
                next(iter(metadata.storage_data.values())).length = value
            elif path == "compressed":
                next(iter(metadata.storage_data.values())).transform_descriptors = value
            else:
                setattr(metadata, path, value)

    return change


@pytest.mark.parametrize(
    ("chunks", "size", "change", "words"),
    [
        ([((0, 0), WHOLE[:4])], (6, 7), bent(), "do not make it up"),
        ([((0, 0), WHOLE[:4]), ((3, 0), WHOLE[3:5])], (6, 7), bent(), "do not make it up"),
        ([((0, 0), WHOLE[:, :4]), ((0, 2), WHOLE[:, 2:5])], (6, 7), bent(), "do not make it up"),
        ([((1, 0), WHOLE)], (6, 7), bent(), "lies outside of it"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="../x"), "outside of its directory"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="/etc/passwd"), "outside of its directory"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="gone.distcp"), "gone.distcp is missing"),
        ([((0, 0), WHOLE)], (6, 7), bent(storage_data={}), "no readable metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(state_dict_metadata=3), "no readable metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(length=10), "no readable checkpoint"),
        ([((0, 0), WHOLE.double())], (6, 7), bent(), "does not match the .metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(compressed=["zstd"]), "is compressed"),
    ],
    ids=[
        "too few", "overlapping rows", "overlapping columns", "outside", "a path up", "an absolute path", "no file", "no places", "no tensors", "cut off",
        "another dtype", "compressed",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(tmp_path, chunks, size, change, words):
    directory = written(tmp_path / "c", chunks, size, change=change)
    with pytest.raises((CorruptFileError, SourceError), match=words):
        open_source(directory).read("w")


def test_nothing_in_the_metadata_is_run(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'made'}",)

    directory = written(tmp_path / "c", [((0, 0), WHOLE)], (6, 7), change=bent(storage_meta=Evil()))
    assert torch.equal(open_source(directory).read("w"), WHOLE)
    assert not (tmp_path / "made").exists()


def test_extract_reads_a_checkpoint_of_sharded_training(tmp_path, capsys):
    saved(tmp_path / "last.ckpt", {"state_dict": {f"model.{name}": tensor for name, tensor in weights(1).items()}})
    torch.save(weights(0), tmp_path / "start.pt")
    assert main(["extract", str(tmp_path / "start.pt"), str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "v")]) == 0
    from lata_lightning import TaskVector

    vector = TaskVector.open(tmp_path / "v")
    assert all(torch.equal(vector[name], weights(1)[name] - weights(0)[name]) for name in weights())
