"""What a path holds, from headers and manifests alone; of directories without torch, so that the answer is there at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lata_lightning.layers import layer_map
from lata_lightning.store.directories import (
    ADAPTER_CONFIG,
    Entry,
    check_index,
    file_layout,
    find_directory,
    holds_adapter,
    holds_vector,
    model_config,
    read_object,
    shard_files,
    weight_files,
)
from lata_lightning.vectors.manifest import Derivation, Identity, read_manifest

# Names of dtypes by their codes in safetensors files.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a task vector, a peft adapter or whole weights, as plain types.

    Raises:
        SourceError, CorruptFileError: The path holds neither, or cannot be read.
    """
    if Path(path).is_file():
        return _describe_file(Path(path))
    directory, _ = find_directory(path)
    if holds_vector(directory):
        return _describe_vector(directory)
    return _describe_adapter(directory) if holds_adapter(directory) else _describe_model(directory)


def _describe_vector(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    alignment = manifest.alignment
    return {
        "holds": f"{manifest.kind} vector",
        "start": f"{manifest.start}: {_where(manifest.start_identity)}",
        "tuned": _where(manifest.tuned_identity),
        "tensors": len(manifest.tensors),
        "unchanged tensors": sum(entry.unchanged for entry in manifest.tensors.values()),
        "tensors in factors": sum(entry.factors is not None for entry in manifest.tensors.values()),
        "parameters": sum(math.prod(entry.shape) for entry in manifest.tensors.values()),
        "dtype": ", ".join(sorted({entry.dtype for entry in manifest.tensors.values()})),
        "blocks": len(manifest.layers.blocks),
        "outside the blocks": dict(manifest.layers.outside()),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "weighting": None if manifest.coefficients is None else manifest.weighting,
        "level": None if manifest.coefficients is None else manifest.level,
        **_derived(manifest.derivation),
        "alignment spread": None if alignment is None else round(alignment.spread, 6),
        "too flat to rank": None if alignment is None else alignment.flat,
    }


def _derived(derivation: Derivation | None) -> dict[str, Any]:
    """How a vector was made of others; of each thing that was measured its range over the layers."""
    if derivation is None:
        return {}
    facts: dict[str, Any] = {
        "derivation": derivation.name,
        "derivation settings": dict(derivation.settings),
        "made of": ", ".join(entry.label for entry in derivation.inputs) or None,
        "plain means": len(derivation.averaged) or None,
    }
    for measured in derivation.measured:
        known = {layer: number for layer, number in measured.layers.items() if number is not None}
        if known:
            least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            facts[measured.title] = f"{known[least]:.4g} ({least}) to {known[most]:.4g} ({most})"
    return facts


def _describe_adapter(path: Path) -> dict[str, Any]:
    config = read_object(path / ADAPTER_CONFIG)
    facts = {"type": "peft_type", "base": "base_model_name_or_path", "rank": "r", "initialisation": "init_lora_weights"}
    entries = _entries(shard_files(path, "adapter_model"))
    return {"holds": "peft adapter", **{fact: config.get(key) for fact, key in facts.items()}, **_sizes(entries)}


def _describe_model(path: Path) -> dict[str, Any]:
    entries, config = _entries(weight_files(path)), model_config(path)
    check_index(path, set(entries))
    return {"holds": "weights", "architecture": ", ".join((config or {}).get("architectures") or []) or None, **_weights(entries)}


def _describe_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        entries = file_layout(path)
    else:
        from lata_lightning.store.opening import open_source
        from lata_lightning.store.sources import DTYPES

        source = open_source(path)
        codes = {dtype: code for code, dtype in DTYPES.items()}
        entries = {name: Entry(source.shape(name), codes.get(source.dtype(name), str(source.dtype(name)))) for name in source.names}
    return {"holds": "weights", "architecture": None, **_weights(entries)}


def _entries(files: list[Path]) -> dict[str, Entry]:
    return {name: entry for file in files for name, entry in file_layout(file).items()}


def _sizes(entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        "tensors": len(entries),
        "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "dtype": ", ".join(sorted({_DTYPES.get(entry.code, entry.code) for entry in entries.values()})),
    }


def _weights(entries: Mapping[str, Entry]) -> dict[str, Any]:
    places = layer_map(entries)
    return {
        **_sizes(entries),
        "blocks": len(places.blocks),
        "first and last block": f"{places.blocks[0]} … {places.blocks[-1]}" if places.blocks else None,
        "outside the blocks": places.outside(),
    }


def _where(identity: Identity) -> str:
    return f"{identity.location or 'weights in memory'} ({identity.content_hash or 'not hashed'})"
