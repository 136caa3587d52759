"""What makes a Hugging Face model directory complete besides its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, SourceError, first_three
from lata_lightning.store.directories import MANIFEST_NAME, MERGE_RECORD, shard_files
from lata_lightning.store.file_source import open_safetensors
from lata_lightning.store.sources import Source, hashes_of
from lata_lightning.store.tokens import tokenizer_files
from lata_lightning.store.writer import write_config

_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def copy_companions(
    source: Source,
    directory: Path,
    dtype: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Source | None = None,
) -> None:
    """Copy config, tokenizer and other small files of a source's directory; weights, shard indices, cards and records stay behind.

    Args:
        source: Weights; nothing is copied if they lie in no directory.
        directory: Where to.
        dtype: Written into config.json, if the weights were cast to it.
        config: Written as config.json in place of that of the source, where the weights have another shape.
        tokenizer: Whose tokenizer files are copied in place of those of the source.
    """
    if source.directory is None:
        return
    listed = [file for file in sorted(source.directory.iterdir()) if file.is_file()]
    if tokenizer is not None and tokenizer.directory is not None:
        own = tokenizer_files(source.directory)
        listed = [file for file in listed if file not in own] + tokenizer_files(tokenizer.directory)
    for file in listed:
        if file.suffix not in _COMPANION_SUFFIXES or file.name.endswith(".index.json"):
            continue
        if file.name in (MANIFEST_NAME, MERGE_RECORD):
            continue
        shutil.copyfile(file, directory / file.name)
    written = source.config if config is None else config
    if written is not None and (dtype is not None or written != source.config):
        if dtype is not None:
            written = {**{key: value for key, value in written.items() if key != "torch_dtype"}, "dtype": dtype}
        write_config(directory / "config.json", written)


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
    stored = open_safetensors(shard_files(path, "model"), path)
    wrong = set(stored.names) ^ set(expected)
    found = hashes_of(stored, [name for name in stored.names if name in expected])
    wrong |= {name for name, digest in found.items() if digest != expected[name]}
    if wrong:
        raise CorruptFileError(
            f"{path} is not what was written: different are {first_three(wrong)}. Copy it again from where it was whole."
        )
    return len(expected)
