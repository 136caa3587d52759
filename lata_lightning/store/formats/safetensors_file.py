"""A safetensors file, whatever its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.store.checkpoint_content import LocatedWeights
from lata_lightning.store.descriptors import first_bytes
from lata_lightning.store.directories import model_config
from lata_lightning.store.formats.format import Format, without_hashes
from lata_lightning.store.formats.quantised import check_not_quantised
from lata_lightning.store.layout import Span, safetensors_spans, weights_facts
from lata_lightning.store.weight_files import home_of

if TYPE_CHECKING:
    from lata_lightning.store.sources import Origin, TensorSource

_NAME = "safetensors file"


def _recognise(path: Path) -> bool:
    if not path.is_file():
        return False
    begin = first_bytes(path, 9)
    return begin[8:] == b"{" or (path.suffix == ".safetensors" and begin[:4] != b"vers")


def _open(path: Path, origin: Origin, model: str | None) -> TensorSource:
    from lata_lightning.store.file_source import FileSource

    weights = _weights(path, model)
    check_not_quantised(origin.location, weights.entries, None)
    home = home_of(path)
    return FileSource(weights.locations, replace(origin, directory=home, config=None if home is None else model_config(home)))


def _inspect(path: Path, model: str | None) -> dict[str, Any]:
    return {"holds": "weights", "format": _NAME, "architecture": None, **weights_facts(_weights(path, model).entries)}


def _weights(path: Path, model: str | None) -> LocatedWeights[Span]:
    return LocatedWeights(safetensors_spans(path), {}).of(model, str(path))


SAFETENSORS_FILE = Format(_NAME, _recognise, _open, _inspect, without_hashes(_NAME))
