"""The config of a merged model, and the comparison of its files with the recorded hashes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lata_lightning.errors import CorruptFileError, SourceError, differing
from lata_lightning.store.directories import MANIFEST_NAME, MERGE_RECORD, read_object
from lata_lightning.store.file_source import open_safetensors
from lata_lightning.store.seal import check_seal
from lata_lightning.store.sources import TensorSource, hashes_of
from lata_lightning.store.weight_files import shard_files


def finished_config(source: TensorSource, dtype: str | None, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the config.json of a model made from another one; None if the file of the source can be copied as it is.

    Args:
        source: The model it was made from.
        dtype: Name of the dtype that the weights were cast to; None if they were not.
        config: The config to write where the weights have other shapes than the source; None for that of the source.
    """
    written = source.config if config is None else config
    if written is None or (dtype is None and written == source.config):
        return None
    if dtype is None:
        return written
    return {**{key: value for key, value in written.items() if key != "torch_dtype"}, "dtype": dtype}


def verify_merged(path: Path) -> int:
    """Compare the bytes of a merged model with the hashes in its record, and the record with its own; return how many tensors were compared.

    Raises:
        SourceError: The directory was not made by a merge.
        CorruptFileError: A tensor is missing or does not match its hash, or the record was edited.
    """
    if not (path / MERGE_RECORD).is_file():
        raise SourceError(f"{path} holds neither {MANIFEST_NAME} nor {MERGE_RECORD}: there are no hashes to compare with")
    try:
        record = read_object(path / MERGE_RECORD)
        expected: dict[str, str] = dict(record["tensors"])
        # Records of earlier releases have no hash of themselves.
        if "format_version" in record:
            check_seal((path / MERGE_RECORD).read_text("utf-8"), path / MERGE_RECORD)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path / MERGE_RECORD} is no merge record ({error!r})") from error
    stored = open_safetensors(shard_files(path, "model"), path)
    wrong = set(stored.names) ^ set(expected)
    hashes = hashes_of(stored, [name for name in stored.names if name in expected])
    wrong |= {name for name, digest in hashes.items() if digest != expected[name]}
    if wrong:
        raise CorruptFileError(
            f"{path} does not match its record: {differing(wrong, len({*stored.names, *expected}))}. Copy it again from where it was whole."
        )
    return len(expected)
