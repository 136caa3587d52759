"""A file of ``torch.save``: a state dict, or a checkpoint that holds one, of Lightning and of others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.errors import SourceError, first_three
from lata_lightning.store.checkpoint_content import LocatedWeights, weights_in
from lata_lightning.store.descriptors import DESCRIPTORS, first_bytes
from lata_lightning.store.directories import model_config
from lata_lightning.store.formats.format import Format, without_hashes
from lata_lightning.store.formats.quantised import check_not_quantised
from lata_lightning.store.layout import Span, weights_facts
from lata_lightning.store.pickles import mapping
from lata_lightning.store.torch_archive import LEGACY, ZIP, TorchArchive
from lata_lightning.store.weight_files import home_of

if TYPE_CHECKING:
    from lata_lightning.store.sources import Origin, TensorSource

_NAME = "file of torch.save"
_PART = re.compile(r"consolidated\.\d+\.pth")


def read_weights(path: Path, model: str | None = None) -> LocatedWeights[Span]:
    """Return the weights in a file of ``torch.save``.

    Args:
        path: The file.
        model: Which model to take, where the file has several.

    Raises:
        SourceError, CorruptFileError: It has no weights that can be read.
    """
    return _weights(_archive(path), path, model)


def _archive(path: Path) -> TorchArchive:
    parts = [file.name for file in path.parent.iterdir() if _PART.fullmatch(file.name)] if _PART.fullmatch(path.name) else []
    if len(parts) > 1:
        raise SourceError(
            f"{path} is one of {first_three(parts)}: each holds a part of every matrix, split for tensor parallelism. Convert them to one Hugging Face "
            "directory with the script of the model's family, such as transformers' convert_llama_weights_to_hf.py, and give that."
        )
    return TorchArchive(DESCRIPTORS.identify(path))


def _weights(archive: TorchArchive, path: Path, model: str | None = None) -> LocatedWeights[Span]:
    return weights_in(archive.content, archive.tensor, str(path), model)


def _recognise(path: Path) -> bool:
    if not path.is_file():
        return False
    begin = first_bytes(path, len(LEGACY))
    return begin == LEGACY or begin.startswith(ZIP)


def _open(path: Path, origin: Origin, model: str | None) -> TensorSource:
    from lata_lightning.store.file_source import FileSource

    weights = read_weights(path, model)
    check_not_quantised(origin.location, weights.entries, None)
    home = home_of(path)
    config = None if home is None else model_config(home)
    return FileSource(weights.locations, replace(origin, directory=home, config=config), weights.tied)


def _inspect(path: Path, model: str | None) -> dict[str, Any]:
    archive = _archive(path)
    lightning = "pytorch-lightning_version" in (mapping(archive.content) or {})
    kind = f"Lightning checkpoint, a {_NAME}" if lightning else _NAME
    return {"holds": "weights", "format": kind, "architecture": None, **weights_facts(_weights(archive, path, model).entries)}


TORCH_FILE = Format(_NAME, _recognise, _open, _inspect, without_hashes(_NAME))
