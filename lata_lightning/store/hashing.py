"""Hashes of tensors and of whole models, with BLAKE3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from blake3 import blake3
from torch import Tensor
from typing_extensions import override

_CHUNK = 1 << 16


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in memory order, little endian, without a copy where it is contiguous on the CPU."""
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.data


def hash_stored(tensor: Tensor) -> str:
    """Return the hash of a tensor as it is stored: ``blake3:`` and 64 hex digits."""
    return "blake3:" + blake3(tensor_bytes(tensor)).hexdigest()


def hash_values(tensor: Tensor) -> str:
    """Return the hash of a tensor's values, the same for every precision that holds them: the hash of its float32 (or float64) form."""
    return hash_stored(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))


class StoredHash:
    """The hash of a tensor as it is stored, from its chunks in order (see ``hash_stored``)."""

    def __init__(self) -> None:
        self._digest = blake3()

    def update(self, piece: Tensor) -> None:
        """Add the next chunk."""
        self._digest.update(tensor_bytes(piece))

    def digest(self) -> str:
        """Return the hash of all chunks."""
        return "blake3:" + self._digest.hexdigest()


class ValueHash(StoredHash):
    """The hash of a tensor's values, from its chunks in order (see ``hash_values``)."""

    @override
    def update(self, piece: Tensor) -> None:
        super().update(piece.to(torch.promote_types(piece.dtype, torch.float32)))


def value_sums(tensor: Tensor) -> Tensor:
    """Return the sum and the sum of squares of a tensor's entries, whose bits are taken as integers: int64 of shape (2,), with overflow.

    The sums of shards add up to the sums of the whole tensor, so both can be compared. They tell weights apart, but are no cryptographic hash.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    integers = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64)
    # Chunk by chunk, as the wide integers of a whole tensor would take up to four times its memory.
    for part in torch.split(integers, _CHUNK):
        bits = part.to(torch.int64)
        sums += torch.stack([bits.sum(), (bits * bits).sum()])
    return sums


def content_hash(tensor_hashes: Mapping[str, str]) -> str:
    """Return the hash of a set of named tensors, independent of their order and of the files they are spread over."""
    digest = blake3()
    for name in sorted(tensor_hashes):
        digest.update(f"{len(name)}:{name}={tensor_hashes[name]}\n".encode())
    return "blake3:" + digest.hexdigest()
