"""A directory of ``torch.distributed.checkpoint``, which Lightning writes for models that are spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.store.checkpoint_content import LocatedWeights, weights_in
from lata_lightning.store.descriptors import first_bytes
from lata_lightning.store.formats.format import Format, without_hashes
from lata_lightning.store.layout import weights_facts
from lata_lightning.store.sharded_metadata import METADATA, ShardedTensor, read_metadata

if TYPE_CHECKING:
    from lata_lightning.store.sources import Origin, TensorSource

_NAME = "sharded checkpoint directory"


def _recognise(path: Path) -> bool:
    return (path / METADATA).is_file() and first_bytes(path / METADATA, 1) == b"\x80"


def _open(path: Path, origin: Origin, model: str | None) -> TensorSource:
    from lata_lightning.store.sharded_source import ShardedSource

    weights = _weights(path, model)
    return ShardedSource(weights.locations, origin, weights.tied)


def _inspect(path: Path, model: str | None) -> dict[str, Any]:
    weights = _weights(path, model)
    files = {chunk.file for tensor in weights.locations.values() for chunk in tensor.chunks}
    kind = f"{_NAME} (torch.distributed.checkpoint), {len(files)} files"
    return {"holds": "weights", "format": kind, "architecture": None, **weights_facts(weights.entries)}


def _weights(path: Path, model: str | None) -> LocatedWeights[ShardedTensor]:
    return weights_in(read_metadata(path), lambda value: value if isinstance(value, ShardedTensor) else None, str(path), model)


SHARDED_CHECKPOINT = Format(_NAME, _recognise, _open, _inspect, without_hashes(_NAME))
