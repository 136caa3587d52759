"""The table of all formats, and the search for the format of a path."""

from __future__ import annotations

from pathlib import Path

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.descriptors import unreadable
from lata_lightning.store.formats.format import Format
from lata_lightning.store.formats.hf_directory import MODEL_DIRECTORY
from lata_lightning.store.formats.safetensors_file import SAFETENSORS_FILE
from lata_lightning.store.formats.sharded_checkpoint import SHARDED_CHECKPOINT
from lata_lightning.store.formats.torch_file import TORCH_FILE
from lata_lightning.store.formats.unread import UNREAD

FORMATS: tuple[Format, ...] = (SAFETENSORS_FILE, TORCH_FILE, SHARDED_CHECKPOINT, *UNREAD, MODEL_DIRECTORY)
"""In the order in which they are tried. A new format is a module of this package and an entry here."""


def find_format(path: Path) -> Format:
    """Return the format of an existing file or directory, by its content.

    Raises:
        SourceError: The format is not known, or the path cannot be read.
        CorruptFileError: It is empty.
    """
    try:
        matching = next((known for known in FORMATS if known.recognise(path)), None)
        if matching is not None:
            return matching
        if path.is_file() and path.stat().st_size == 0:
            raise CorruptFileError(f"{path} is empty. Copy or download it again.")
    except OSError as error:
        raise unreadable(path, error) from error
    raise SourceError(
        f"{path} is of no format that is read here: expected a safetensors file, a file of torch.save (.bin, .pt, .pth, .ckpt), a sharded checkpoint "
        "or a model directory. Is it complete?"
    )
