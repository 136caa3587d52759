"""A model directory as transformers saves it, in safetensors or pickled, in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.checkpoint_content import LocatedWeights
from lata_lightning.store.directories import holds_vector, model_config
from lata_lightning.store.formats.format import Format
from lata_lightning.store.formats.quantised import check_not_quantised, quantisation
from lata_lightning.store.formats.torch_file import read_weights
from lata_lightning.store.layout import Span, joined, safetensors_spans, weights_facts
from lata_lightning.store.weight_files import Files, weight_files

if TYPE_CHECKING:
    from lata_lightning.store.sources import Origin, TensorSource

_NAME = "model directory"


def _recognise(path: Path) -> bool:
    return path.is_dir()


def _open(path: Path, origin: Origin, model: str | None) -> TensorSource:
    from lata_lightning.store.file_source import FileSource

    config = model_config(path)
    _, weights = _read(path, config)
    check_not_quantised(origin.location, weights.entries, config)
    weights = weights.of(model, str(path))
    return FileSource(weights.locations, replace(origin, directory=path, config=config), weights.tied)


def _inspect(path: Path, model: str | None) -> dict[str, Any]:
    config = model_config(path)
    files, weights = _read(path, config)
    entries = weights.of(model, str(path)).entries
    kind = "safetensors" if files.safetensors else "pickled"
    count = len(files.paths)
    return {
        "holds": "weights",
        "format": f"{_NAME}, {kind}, {'one file' if count == 1 else f'{count} shards'}",
        "architecture": ", ".join((config or {}).get("architectures") or []) or None,
        "quantised by": quantisation(entries, config),
        **weights_facts(entries),
    }


def _read(path: Path, config: Mapping[str, Any] | None) -> tuple[Files, LocatedWeights[Span]]:
    """Return the files of a directory that hold its weights, and the tensors in them."""
    if holds_vector(path):
        raise SourceError(f"{path} is a task vector, and a model is needed here")
    files = weight_files(path, config)
    tied: dict[str, str] = {}
    if files.safetensors:
        spans = joined(safetensors_spans(file) for file in files.paths)
    else:
        parts = [read_weights(file) for file in files.paths]
        spans = joined(part.locations for part in parts)
        tied = {alias: name for part in parts for alias, name in part.tied.items()}
    missing = files.listed - set(spans) - set(tied)
    if missing:
        raise CorruptFileError(
            f"{files.index_file} lists tensors that its files do not hold, {first_three(missing)}. Copy the directory again."
        )
    return files, LocatedWeights(spans, tied)


def _verify(path: Path) -> int:
    from lata_lightning.store.model_directory import verify_merged

    return verify_merged(path)


MODEL_DIRECTORY = Format(_NAME, _recognise, _open, _inspect, _verify)
