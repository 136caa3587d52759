"""What a path holds, from headers and manifests alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lata_lightning.layers import layer_map
from lata_lightning.store.adapters import holds_adapter, read_config
from lata_lightning.store.manifest import Identity, read_manifest
from lata_lightning.store.opening import open_source, shard_files
from lata_lightning.store.sources import SafetensorsSource, holds_vector


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a task vector, a peft adapter or whole weights, as plain types.

    Raises:
        SourceError, CorruptFileError: The path holds neither, or cannot be read.
    """
    if holds_vector(path):
        return _describe_vector(Path(path))
    return _describe_adapter(Path(path)) if holds_adapter(path) else _describe_weights(path)


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
        "parameters": sum(torch.Size(entry.shape).numel() for entry in manifest.tensors.values()),
        "dtype": ", ".join(sorted({entry.dtype for entry in manifest.tensors.values()})),
        "blocks": len(manifest.layers.blocks),
        "outside the blocks": dict(manifest.layers.outside()),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "weighting": None if manifest.coefficients is None else manifest.weighting,
        "level": None if manifest.coefficients is None else manifest.level,
        "alignment spread": None if alignment is None else round(alignment.spread, 6),
        "too flat to rank": None if alignment is None else alignment.flat,
    }


def _describe_adapter(path: Path) -> dict[str, Any]:
    config, source = read_config(path), SafetensorsSource(shard_files(path, "adapter_model"))
    return {
        "holds": "peft adapter",
        "type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "initialisation": config.get("init_lora_weights"),
        "tensors": len(source.names),
        "parameters": sum(torch.Size(source.shape(name)).numel() for name in source.names),
        "dtype": ", ".join(sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names})),
    }


def _describe_weights(path: str | Path) -> dict[str, Any]:
    source = open_source(path)
    places = layer_map(source.names)
    return {
        "holds": "weights",
        "architecture": ", ".join((source.config or {}).get("architectures") or []) or None,
        "tensors": len(source.names),
        "parameters": sum(torch.Size(source.shape(name)).numel() for name in source.names),
        "dtype": ", ".join(sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names})),
        "blocks": len(places.blocks),
        "first and last block": f"{places.blocks[0]} … {places.blocks[-1]}" if places.blocks else None,
        "outside the blocks": places.outside(),
    }


def _where(identity: Identity) -> str:
    return f"{identity.location or 'weights in memory'} ({identity.content_hash or 'not hashed'})"
