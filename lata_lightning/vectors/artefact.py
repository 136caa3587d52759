"""Saving a task vector to its directory, opening it, and comparing its files with the recorded hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lata_lightning.errors import CorruptFileError, differing
from lata_lightning.numerics.chunks import ChunkReader, chunk_bounds, in_parallel, tensor_chunks, worker_count
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import all_finite
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.file_source import open_safetensors
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.sources import TensorSource, hashes_of
from lata_lightning.store.tied_names import TiedNames, ties_of
from lata_lightning.store.weight_files import shard_files
from lata_lightning.store.writer import Progress, ShardWriter, atomic_directory, check_free_directory, layout_size
from lata_lightning.vectors.cards import vector_card
from lata_lightning.vectors.differences import LossMeter, StoredDifference
from lata_lightning.vectors.entries import FactorEntry, TensorEntry, factor_names
from lata_lightning.vectors.manifest import Manifest, read_manifest, write_manifest
from lata_lightning.vectors.provenance import Derivation, LayerValues

STEM = "delta"


def open_stored(path: str | Path) -> tuple[StoredDifference, Manifest]:
    """Return the tensors of a saved vector, which stay on disk until they are asked for, and its manifest.

    Raises:
        SourceError: The path is no task vector.
        CorruptFileError: A file is truncated, or does not match the manifest.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    stored = open_safetensors(shard_files(directory, STEM), path)
    expected = _expected(manifest)
    wrong = set(stored.names) ^ set(expected)
    wrong |= {name for name, (shape, _) in expected.items() if name in stored.names and stored.shape(name) != shape}
    if wrong:
        raise CorruptFileError(
            f"the tensors of {directory} are not those of its manifest; {differing(wrong, len({*stored.names, *expected}))}. Copy it again."
        )
    return StoredDifference(stored, manifest), manifest


def verify(path: str | Path) -> int:
    """Compare the bytes of a saved task vector with the hashes in its manifest, and the manifest with its own; return how many tensors were compared.

    Raises:
        SourceError: The path is no task vector.
        CorruptFileError: A tensor does not match its hash, or the manifest was edited.
    """
    read_manifest(Path(path), sealed_only=True)
    _, manifest = open_stored(path)
    stored = open_safetensors(shard_files(Path(path), STEM), path)
    expected = {name: digest for name, (_, digest) in _expected(manifest).items()}
    hashes = hashes_of(stored, list(expected))
    wrong = [name for name, digest in expected.items() if hashes[name] != digest]
    if wrong:
        raise CorruptFileError(
            f"{path} does not match its record: {differing(wrong, len(expected))}. Copy it again from where it was whole."
        )
    return len(expected)


def _expected(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Return shape and hash of every tensor in the files of a vector."""
    return {stored: facts for name, entry in manifest.tensors.items() for stored, facts in entry.stored(name).items()}


def save_vector(
    tensors: TensorSource,
    manifest: Manifest,
    target: Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Write differences and their manifest (see ``TaskVector.save``, which describes arguments and errors)."""
    stored = float_dtype(dtype)
    check_free_directory(target)
    frozen = frozenset(name for name, entry in manifest.tensors.items() if entry.unchanged)
    factors = {name: low for name in tensors.names if name not in frozen and (low := tensors.low_rank(name)) is not None}
    layout = {name: (stored, tensors.shape(name)) for name in tensors.names if name not in frozen and name not in factors}
    parts: dict[str, Tensor] = {}
    for name, low_rank in factors.items():
        for index, part in enumerate(low_rank.parts):
            parts.update(zip(factor_names(name, index), (part.left, part.right), strict=True))
    layout |= {name: (stored, tuple(side.shape)) for name, side in parts.items()}
    threads = worker_count(workers)
    losses = {name: LossMeter() for name in layout}
    with atomic_directory(target, layout_size(layout)) as directory:
        metadata = {"format": "pt"}
        with ShardWriter(directory, STEM, layout, max_shard_bytes=max_shard_bytes, metadata=metadata, progress=progress) as writer:

            def write(name: str) -> None:
                load = tensor_chunks(parts[name].cpu()) if name in parts else tensors.chunks(name)
                meter = None if name in parts else losses[name]
                writer.stream(name, _lowered(tensors.label, name, load, math.prod(layout[name][1]), stored, meter))

            in_parallel(write, writer.order, threads if tensors.parallel else 1)
        loss = LossMeter()
        for name in layout:
            loss.add_sums(losses[name])
        for low_rank in factors.values():
            if any(torch.promote_types(side.dtype, stored) != stored for part in low_rank.parts for side in (part.left, part.right)):
                loss.add_factors(low_rank, low_rank.stored_as(stored))
        entries = {
            name: TensorEntry(
                tensors.shape(name),
                dtype,
                writer.hashes.get(name),
                unchanged=name in frozen,
                factors=_factor_entries(name, factors[name], writer.hashes) if name in factors else None,
            )
            for name in tensors.names
        }
        manifest = replace(
            manifest,
            tensors=entries,
            precision_loss=loss.result(),
            derivation=derivation_of(tensors, manifest),
            tied=_tied(tensors, manifest),
            **_identities(tensors, manifest),
        )
        write_manifest(directory, manifest)
        (directory / "README.md").write_text(vector_card(manifest, target.name), "utf-8")


def derivation_of(tensors: TensorSource, manifest: Manifest) -> Derivation | None:
    """Return how a vector was made from others, with what was measured while its tensors were read; None if it was not made from others."""
    derivation = manifest.derivation
    measured = tuple(LayerValues(name, layers, vector) for (name, vector), layers in tensors.measured().items())
    return replace(derivation, measured=measured) if derivation is not None and measured else derivation


def _lowered(label: str, name: str, load: ChunkReader, count: int, stored: torch.dtype, loss: LossMeter | None) -> Iterator[Tensor]:
    """Yield the chunks of a tensor in the precision in which they are stored."""
    for begin, end in chunk_bounds(count):
        full = load(begin, end)
        lower = full.to(stored)
        _check_stored(label, name, full, lower)
        if loss is not None and full.dtype != stored:
            loss.add(full, lower)
        yield lower


def _check_stored(label: str, name: str, full: Tensor, lower: Tensor) -> None:
    if all_finite(lower):
        return
    dtype = str(lower.dtype).removeprefix("torch.")
    what = "holds NaN or infinite values" if not all_finite(full) else f"does not fit {dtype}; use bfloat16 or float32"
    raise CorruptFileError(f"{name} of {label} {what}")


def _tied(tensors: TensorSource, manifest: Manifest) -> TiedNames:
    """Return the groups of names that are one tensor in the model: those that the vector knows, else those of the model of its config."""
    config = manifest.meaning.config
    model = None if manifest.tied else meta_model(config)
    return manifest.tied if model is None else ties_of(model, set(tensors.names))


def _identities(tensors: TensorSource, manifest: Manifest) -> dict[str, Any]:
    """Return the identities of both sides, with the content hashes that were computed while reading."""
    start, tuned = tensors.content_hashes()
    return {
        "start_identity": replace(manifest.start_identity, content_hash=manifest.start_identity.content_hash or start),
        "tuned_identity": replace(manifest.tuned_identity, content_hash=manifest.tuned_identity.content_hash or tuned),
    }


def _factor_entries(name: str, factors: LowRank, hashes: Mapping[str, str]) -> tuple[FactorEntry, ...]:
    entries = []
    for index, part in enumerate(factors.parts):
        left, right = factor_names(name, index)
        entries.append(FactorEntry(part.rank, part.scale, hashes[left], hashes[right]))
    return tuple(entries)
