"""A safetensors file, whatever its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.store.descriptors import first_bytes
from lata_lightning.store.formats.format import Format, without_hashes
from lata_lightning.store.formats.quantised import check_not_quantised
from lata_lightning.store.layout import safetensors_spans, weights_facts

if TYPE_CHECKING:
    from lata_lightning.store.sources import Source

_NAME = "safetensors file"


def _recognise(path: Path) -> bool:
    if not path.is_file():
        return False
    begin = first_bytes(path, 9)
    return begin[8:] == b"{" or (path.suffix == ".safetensors" and begin[:4] != b"vers")


def _open(path: Path, location: str) -> Source:
    from lata_lightning.store.file_source import FileSource

    spans = safetensors_spans(path)
    check_not_quantised(location, {name: span.entry for name, span in spans.items()}, None)
    return FileSource(spans, location)


def _inspect(path: Path) -> dict[str, Any]:
    entries = {name: span.entry for name, span in safetensors_spans(path).items()}
    return {"holds": "weights", "format": _NAME, "architecture": None, **weights_facts(entries)}


SAFETENSORS_FILE = Format(_NAME, _recognise, _open, _inspect, without_hashes(_NAME))
