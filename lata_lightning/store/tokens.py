"""Which token each row of an embedding stands for, from the tokenizer files beside the weights; nothing here needs torch."""

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
# Those that decide which token has which row. The roles of tokens and the template of a chat do not.
_VOCABULARY = re.compile(r"^(tokenizer|tekken|added_tokens)\.json$|^(vocab|merges)[\w-]*\.|\.(model|tiktoken|spm|codes)$")
LAST = 256
"""So many tokens, those of the highest rows, are recorded by name, as tokens are added behind the others."""
_SETTINGS, _ADDED = "tokenizer_config.json", "added_tokens_decoder"


class Tokens(NamedTuple):
    """What the tokenizer of a model says: token by row, or None and why that is not known."""

    by_row: Mapping[int, str] | None
    unknown: str = ""


class _Known(NamedTuple):
    """What is known of a tokenizer once its files are read: see the attributes of ``Vocabulary``."""

    size: int | None
    hash: str | None
    first_hash: str | None
    last: Mapping[int, str]
    tokens: Tokens


class Vocabulary:
    """Identity of a tokenizer: two are equal if every row is the same token in both.

    Args:
        files: Hash of the files that decide which token has which row.
        read: Tells the rest. Called when that is asked for, as a comparison of the files often is enough.
    """

    def __init__(self, files: str, read: Callable[[], _Known]) -> None:
        self.files, self._read = files, read

    @classmethod
    def of_directory(cls, directory: Path, label: str, rows: int | None) -> Vocabulary | None:
        """That of a model directory; None if there are no tokenizer files in it.

        Args:
            directory: Where they lie.
            label: Name of the model, for messages.
            rows: Rows of its embedding: tokens beyond them do not count.
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
    def from_json(cls, data: Mapping[str, Any]) -> Vocabulary:
        """The inverse of ``to_json``."""
        last = {int(row): token for row, token in data["last"].items()}
        unknown = Tokens(None, "a saved vector records no more than the last of its tokens")
        known = _Known(data["tokens"], data["hash"], data["first_hash"], last, unknown)
        return cls(data["files"], lambda: known)

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
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
        """Token by row, where the tokenizer is at hand and can be read."""
        return self._known.tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.files == other.files or (self.hash is not None and self.hash == other.hash)

    __hash__ = None  # type: ignore[assignment]

    def beside(self, other: Vocabulary) -> Mapping[int, str] | None:
        """Token by row, as far as another tokenizer tells what this one records by a hash only; None where it does not.

        Of two that are recorded, and agree on the first of their tokens, these are left out.
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
    """The files of a model directory that are its tokenizer and chat template, in order."""
    return sorted(file for file in directory.iterdir() if file.is_file() and _TOKENIZER.search(file.name))


def hash_of_files(directory: Path) -> str:
    """Hash of the files of a model directory that decide which token has which row."""
    digest = blake3()
    for file in tokenizer_files(directory):
        if _VOCABULARY.search(file.name):
            content = file.read_bytes()
            digest.update(f"{file.name}:{len(content)}:".encode() + content)
    added = _added_later(directory)
    digest.update(json.dumps(sorted(added.items())).encode())
    return "blake3:" + digest.hexdigest()


def hash_of_tokens(by_row: Mapping[int, str]) -> str:
    """Hash of the text ``ROW:LENGTH:TOKEN`` and a newline for each token, by rising row; the length is the number of characters."""
    digest = blake3()
    for row, token in sorted(by_row.items()):
        digest.update(f"{row}:{len(token)}:{token}\n".encode())
    return "blake3:" + digest.hexdigest()


def read_tokens(directory: Path | None, label: str) -> Tokens:
    """Token by row, from the tokenizer files of a model directory.

    Args:
        directory: Where they lie; None for weights that lie in none.
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
        # Every library below raises errors of its own kind; what was not understood is told to the user.
        reason = str(error).strip().partition("\n")[0]
        return Tokens(None, f"the tokenizer of {label} cannot be read ({type(error).__name__}: {reason})")


def within(by_row: Mapping[int, str], size: int) -> dict[int, str]:
    """The tokens that a model of so many rows has a row for; tokenizers may know more."""
    return {row: token for row, token in by_row.items() if row < size}


def _plain_tokens(directory: Path) -> dict[int, str] | None:
    """Token by row from files that list them plainly, which takes a fraction of the time that making a tokenizer takes; None for others."""
    try:
        if (directory / "tokenizer.json").is_file():
            data = read_object(directory / "tokenizer.json")
            vocabulary = data["model"]["vocab"]
            listed = (
                enumerate(piece for piece, _ in vocabulary)
                if isinstance(vocabulary, list)
                else ((row, token) for token, row in vocabulary.items())
            )
            found = _checked([*listed, *((added["id"], added["content"]) for added in data.get("added_tokens") or ())])
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            found = _checked((row, token) for token, row in read_object(directory / "vocab.json").items())
        else:
            return None
        known = set(found.values())
        return {**{row: token for row, token in _added_later(directory).items() if token not in known and row not in found}, **found}
    except (CorruptFileError, OSError, ValueError, KeyError, TypeError):
        # Another layout: the library that knows it will say what is wrong with it.
        return None


def _added_later(directory: Path) -> dict[int, str]:
    """Tokens that are listed beside the tokenizer itself, as having been added to it."""
    try:
        settings = read_object(directory / _SETTINGS) if (directory / _SETTINGS).is_file() else {}
        listed = [(int(row), token["content"]) for row, token in (settings.get(_ADDED) or {}).items()]
        if (directory / "added_tokens.json").is_file():
            listed += [(row, token) for token, row in read_object(directory / "added_tokens.json").items()]
        return _checked(listed)
    except (CorruptFileError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _checked(listed: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    found = dict(listed)
    if not all(isinstance(row, int) and isinstance(token, str) for row, token in found.items()):
        raise ValueError("rows must be numbers and tokens texts")
    for token in found.values():
        # Halves of surrogate pairs are no text that could be written.
        token.encode()
    return found
