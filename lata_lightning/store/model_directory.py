"""What makes a Hugging Face model directory complete besides its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.directories import MANIFEST_NAME, MERGE_RECORD, shard_files
from lata_lightning.store.hashing import hash_stored
from lata_lightning.store.sources import SafetensorsSource, Source
from lata_lightning.store.writer import write_json

_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def copy_companions(source: Source, directory: Path, dtype: str | None = None) -> None:
    """Copy config, tokenizer and other small files of a source's directory; weights, shard indices, cards and records stay behind.

    Args:
        source: Weights; nothing is copied if they lie in no directory.
        directory: Where to.
        dtype: Written into config.json, if the weights were cast to it.
    """
    if source.directory is None:
        return
    for file in sorted(source.directory.iterdir()):
        if not file.is_file() or file.suffix not in _COMPANION_SUFFIXES or file.name.endswith(".index.json"):
            continue
        if file.name in (MANIFEST_NAME, MERGE_RECORD):
            continue
        shutil.copyfile(file, directory / file.name)
    if dtype is not None and source.config is not None:
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        write_json(directory / "config.json", {**config, "dtype": dtype})


def verify_merged(path: Path) -> int:
    """Compare the bytes of a merged model with the hashes in its record; the number of tensors compared.

    Raises:
        SourceError: The directory was not made by a merge.
        CorruptFileError: A tensor is missing, or is not what was written.
    """
    try:
        expected: dict[str, str] = dict(json.loads((path / MERGE_RECORD).read_text("utf-8"))["tensors"])
    except FileNotFoundError as error:
        raise SourceError(f"{path} holds neither {MANIFEST_NAME} nor {MERGE_RECORD}: there are no hashes to compare with") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path / MERGE_RECORD} is no merge record ({error!r})") from error
    stored = SafetensorsSource(shard_files(path, "model"))
    wrong = set(stored.names) ^ set(expected)
    wrong |= {name for name in stored.names if name in expected and hash_stored(stored.read(name)) != expected[name]}
    if wrong:
        raise CorruptFileError(
            f"{path} is not what was written: different are {first_three(wrong)}. Copy it again from where it was whole."
        )
    return len(expected)
