"""The token of each row of an embedding, from the tokenizer files of a model directory; nothing here needs torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from lata_lightning.errors import CorruptFileError
from lata_lightning.store.directories import read_object

_TOKENIZER = re.compile(
    r"^(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|tekken)[\w-]*\.|^normalizer\.json$|\.(model|tiktoken|spm|codes)$"
)
# The files that decide which token has which row. The roles of tokens and the chat template do not.
_VOCABULARY = re.compile(r"^(tokenizer|tekken|added_tokens)\.json$|^(vocab|merges)[\w-]*\.|\.(model|tiktoken|spm|codes)$")
LAST = 256
"""The number of tokens that are recorded by name: those of the highest rows, where tokens are added."""
_SETTINGS, _ADDED = "tokenizer_config.json", "added_tokens_decoder"


class Tokens(NamedTuple):
    """The tokens of a model by row; or None, and the reason why they are not known."""

    by_row: Mapping[int, str] | None
    unknown: str = ""


class _Known(NamedTuple):
    """What the files of a tokenizer tell: see the properties of ``TokenizerIdentity``."""

    size: int | None
    hash: str | None
    first_hash: str | None
    last: Mapping[int, str]
    tokens: Tokens


class TokenizerIdentity:
    """Identity of a tokenizer: two are equal if every row is the same token in both.

    Args:
        files: Hash of the files that decide which token has which row.
        read: Reads the rest, when it is asked for; often comparing the files is enough.
    """

    def __init__(self, files: str, read: Callable[[], _Known]) -> None:
        self.files, self._read = files, read

    @classmethod
    def of_directory(cls, directory: Path, label: str, rows: int | None) -> TokenizerIdentity | None:
        """Return the identity of the tokenizer in a model directory; None if there are no tokenizer files.

        Args:
            directory: The directory.
            label: Name of the model, for messages.
            rows: Number of rows of its embedding; tokens beyond them do not count.
        """
        if not any(_VOCABULARY.search(file.name) for file in tokenizer_files(directory)):
            return None

        def read() -> _Known:
            tokens = read_tokens(directory, label)
            if tokens.by_row is None:
                return _Known(None, None, None, {}, tokens)
            known = dict(sorted((tokens.by_row if rows is None else within(tokens.by_row, rows)).items()))
            split = max(0, len(known) - LAST)
            first, last = (dict(islice(known.items(), begin, end)) for begin, end in ((0, split), (split, None)))
            return _Known(len(known), hash_of_tokens(known), hash_of_tokens(first), last, Tokens(known))

        return cls(hash_of_files(directory), read)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenizerIdentity:
        """Read what ``to_json`` wrote."""
        last = {int(row): token for row, token in data["last"].items()}
        unknown = Tokens(None, "a saved vector records no more than the last of its tokens")
        known = _Known(data["tokens"], data["hash"], data["first_hash"], last, unknown)
        return cls(data["files"], lambda: known)

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        known = self._known
        last = {str(row): token for row, token in known.last.items()}
        return {"tokens": known.size, "hash": known.hash, "files": self.files, "first_hash": known.first_hash, "last": last}

    @cached_property
    def _known(self) -> _Known:
        return self._read()

    @property
    def count(self) -> int | None:
        """Number of tokens; None if the tokenizer cannot be read."""
        return self._known.size

    @property
    def hash(self) -> str | None:
        """Hash of its tokens by row (see ``hash_of_tokens``); None if the tokenizer cannot be read."""
        return self._known.hash

    @property
    def tokens(self) -> Tokens:
        """Token by row, where the tokenizer can be read."""
        return self._known.tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizerIdentity):
            return NotImplemented
        return self.files == other.files or (self.hash is not None and self.hash == other.hash)

    __hash__ = None  # type: ignore[assignment]

    def compared_with(self, other: TokenizerIdentity) -> Mapping[int, str] | None:
        """Return the token by row, where this tokenizer or the other one can be read; None where neither tells it.

        Where both are only recorded, and agree on their first tokens by hash, the last tokens are returned.
        """
        mine, theirs = self._known, other._known
        if mine.tokens.by_row is not None or mine.size is None:
            return mine.tokens.by_row
        first = mine.size - len(mine.last)
        if theirs.tokens.by_row is None:
            alike = theirs.size is not None and theirs.size - len(theirs.last) == first and theirs.first_hash == mine.first_hash
            return mine.last if alike else None
        begin = dict(islice(sorted(theirs.tokens.by_row.items()), first))
        return {**begin, **mine.last} if hash_of_tokens(begin) == mine.first_hash else None


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of the tokenizer and the chat template of a model directory, in order."""
    return sorted(file for file in directory.iterdir() if file.is_file() and _TOKENIZER.search(file.name))


def hash_of_files(directory: Path) -> str:
    """Return the hash of the files of a model directory that decide which token has which row."""
    digest = blake3()
    for file in tokenizer_files(directory):
        if _VOCABULARY.search(file.name):
            content = file.read_bytes()
            digest.update(f"{file.name}:{len(content)}:".encode() + content)
    added = _added_later(directory)
    digest.update(json.dumps(sorted(added.items())).encode())
    return "blake3:" + digest.hexdigest()


def hash_of_tokens(by_row: Mapping[int, str]) -> str:
    """Return the hash of the text ``ROW:LENGTH:TOKEN`` and a newline for each token, by rising row; the length is the number of characters."""
    digest = blake3()
    for row, token in sorted(by_row.items()):
        digest.update(f"{row}:{len(token)}:{token}\n".encode())
    return "blake3:" + digest.hexdigest()


def read_tokens(directory: Path | None, label: str) -> Tokens:
    """Return the token by row, from the tokenizer files of a model directory.

    Args:
        directory: The directory; None for weights without one.
        label: Name of the model, for messages.
    """
    if directory is None or not tokenizer_files(directory):
        return Tokens(None, f"{label} has no tokenizer files")
    plain = _plain_tokens(directory)
    if plain is not None:
        return Tokens(plain)
    from transformers import AutoTokenizer

    try:
        # Code that comes with a tokenizer is never run.
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return Tokens({row: token for token, row in tokenizer.get_vocab().items()})
    except Exception as error:
        # The libraries below raise errors of many kinds; the reason goes to the user.
        reason = str(error).strip().partition("\n")[0]
        return Tokens(None, f"the tokenizer of {label} cannot be read ({type(error).__name__}: {reason})")


def within(by_row: Mapping[int, str], size: int) -> dict[int, str]:
    """Return the tokens for which a model of so many rows has a row; tokenizers may have more."""
    return {row: token for row, token in by_row.items() if row < size}


def _plain_tokens(directory: Path) -> dict[int, str] | None:
    """Return the token by row from files that list tokens plainly, much faster than a tokenizer is built; None for other files."""
    try:
        if (directory / "tokenizer.json").is_file():
            data = read_object(directory / "tokenizer.json")
            vocabulary = data["model"]["vocab"]
            listed = (
                enumerate(piece for piece, _ in vocabulary)
                if isinstance(vocabulary, list)
                else ((row, token) for token, row in vocabulary.items())
            )
            by_row = _checked([*listed, *((added["id"], added["content"]) for added in data.get("added_tokens") or ())])
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            by_row = _checked((row, token) for token, row in read_object(directory / "vocab.json").items())
        else:
            return None
        known = set(by_row.values())
        return {**{row: token for row, token in _added_later(directory).items() if token not in known and row not in by_row}, **by_row}
    except (CorruptFileError, OSError, ValueError, KeyError, TypeError):
        # Another layout, which the library of the tokenizer may know.
        return None


def _added_later(directory: Path) -> dict[int, str]:
    """Return the tokens that were added to the tokenizer, by row."""
    try:
        settings = read_object(directory / _SETTINGS) if (directory / _SETTINGS).is_file() else {}
        listed = [(int(row), token["content"]) for row, token in (settings.get(_ADDED) or {}).items()]
        if (directory / "added_tokens.json").is_file():
            listed += [(row, token) for token, row in read_object(directory / "added_tokens.json").items()]
        return _checked(listed)
    except (CorruptFileError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _checked(listed: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    by_row = dict(listed)
    if not all(isinstance(row, int) and isinstance(token, str) for row, token in by_row.items()):
        raise ValueError("rows must be numbers and tokens texts")
    for token in by_row.values():
        # Halves of surrogate pairs cannot be encoded.
        token.encode()
    return by_row
