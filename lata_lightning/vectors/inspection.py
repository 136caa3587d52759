"""Facts about what is at a path, from headers and manifests alone, and without importing torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lata_lightning.store.directories import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_directory, find_weights, holds_vector, read_object
from lata_lightning.store.formats.table import find_format
from lata_lightning.vectors.manifest import read_manifest
from lata_lightning.vectors.provenance import Derivation, Identity


def describe(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """Return facts about a task vector, a peft adapter or whole weights, as plain types.

    Args:
        path: A file, a directory or a hub id.
        model: Name of the module to describe, where a checkpoint has several.

    Raises:
        SourceError, CorruptFileError: The path has none of these, or cannot be read.
    """
    local, _ = find_weights(path)
    if holds_vector(local):
        return _describe_vector(local)
    adapter = adapter_directory(local)
    return find_format(local).inspect(local, model) if adapter is None else _describe_adapter(adapter)


def _describe_vector(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    alignment = manifest.alignment
    correlation = None if alignment is None else alignment.norm_correlation
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
        "rank correlation with −relative norm": None if correlation is None else round(correlation, 6),
        "ranks by relative norm": None if alignment is None else alignment.by_relative_norm,
    }


def _derived(derivation: Derivation | None) -> dict[str, Any]:
    """Return how a vector was made from others, with the range over the layers of each quantity that was measured."""
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
    weights = next((path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()), None)
    stored = {} if weights is None else find_format(weights).inspect(weights, None)
    about_tensors: dict[str, Any] = {fact: stored[fact] for fact in ("tensors", "parameters", "dtype") if fact in stored}
    return {"holds": "peft adapter", **{fact: config.get(key) for fact, key in facts.items()}, **about_tensors}


def _where(identity: Identity) -> str:
    return f"{identity.location or 'weights in memory'} ({identity.content_hash or 'not hashed'})"
