"""The provenance of a saved vector, as a table of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lata_lightning.display.charts import as_text
from lata_lightning.store.directories import MANIFEST_NAME
from lata_lightning.vectors.inspection import describe
from lata_lightning.vectors.manifest import Manifest, read_manifest
from lata_lightning.vectors.provenance import Identity


class Facts(NamedTuple):
    """A table of words and values under a heading."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def provenance(label: str, path: Path) -> Facts:
    """Return a table of what the manifest of a saved vector says about its origin.

    Args:
        label: Heading of the table.
        path: Directory of the vector.
    """
    manifest, loss = read_manifest(path), None
    if manifest.precision_loss is not None:
        loss = f"{manifest.precision_loss.zero_fraction:.2%} became zero, cosine {as_text(manifest.precision_loss.cosine, '.6f')}"
    flat = None if manifest.alignment is None else "yes" if manifest.alignment.flat else "no"
    stored = json.loads((path / MANIFEST_NAME).read_text("utf-8")).get("versions")
    facts: dict[str, Any] = {
        "path": str(path),
        **_sides(manifest),
        **{name: value for name, value in describe(path).items() if name not in ("holds", "start", "tuned")},
        "too flat to rank": flat,
        "threshold": manifest.threshold if manifest.weighting == "threshold" else None,
        "coefficient outside": None if manifest.coefficients is None else manifest.outside,
        "precision loss": loss,
        "versions": stored if isinstance(stored, dict) else None,
    }
    return Facts(label, [], [[name, text] for name, value in facts.items() if (text := _text(value))])


def _sides(manifest: Manifest) -> dict[str, str]:
    sides = {"start": f"{manifest.start}: {_identity(manifest.start_identity)}", "tuned": _identity(manifest.tuned_identity)}
    if manifest.instruction_identity is not None:
        base, instruct = manifest.instruction_identity
        sides["instruction vector"] = f"{_identity(instruct)} − {_identity(base)}"
    return sides


def _identity(identity: Identity) -> str:
    words = [identity.location or "weights in memory", *([f"revision {identity.revision}"] if identity.revision else [])]
    return f"{', '.join(words)} ({identity.content_hash or 'not hashed'})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)
