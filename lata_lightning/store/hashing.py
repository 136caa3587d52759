"""Hashes of tensors and of whole models, with BLAKE3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

_FILE_CHUNK = 1 << 22


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order, little endian, without a copy where it is contiguous on the CPU."""
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.data


def hash_stored(tensor: Tensor) -> str:
    """Hash of a tensor as it is stored: ``blake3:`` and 64 hex digits."""
    return "blake3:" + blake3(tensor_bytes(tensor)).hexdigest()


def hash_values(tensor: Tensor) -> str:
    """Hash of a tensor's values, whatever the precision they are stored in: of its float32 (or float64) form."""
    return hash_stored(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))


def hash_file(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = blake3()
    with path.open("rb") as file:
        while chunk := file.read(_FILE_CHUNK):
            digest.update(chunk)
    return "blake3:" + digest.hexdigest()


def content_hash(tensor_hashes: Mapping[str, str]) -> str:
    """Hash of a set of named tensors, independent of their order and of the files they are spread over."""
    digest = blake3()
    for name in sorted(tensor_hashes):
        digest.update(f"{len(name)}:{name}={tensor_hashes[name]}\n".encode())
    return "blake3:" + digest.hexdigest()
