"""Sharded checkpoints, written by torch.distributed.checkpoint or by hand in chunks of several processes."""

import pickle
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


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
