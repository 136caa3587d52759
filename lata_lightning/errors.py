"""The errors of this package: each says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable


class LataError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with 1."""


class LayoutMismatchError(LataError):
    """Two sets of tensors that must be the same differ in names, shapes or vocabulary."""


class BaseMismatchError(LataError):
    """Two vectors were not made from the same weights."""


class SourceError(LataError):
    """A path or hub id cannot be read as weights."""


class CorruptFileError(LataError):
    """A file is truncated, altered or holds NaN or infinite weights."""


class OutputError(LataError):
    """The output cannot be written: it exists already, or the disk is full."""


class WeightingError(LataError):
    """The layers cannot be ranked, or the rule is unknown."""


def first_three(names: Iterable[str]) -> str:
    """Return how many names there are and the first three of them, for an error message."""
    listed = sorted(names)
    shown = ", ".join(repr(name) for name in listed[:3])
    return f"{len(listed)}: [{shown}{', …' if len(listed) > 3 else ''}]"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the name of the error where it has none; for an error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the choice most similar to a word, or a full stop if none is similar; for an error message."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(choices), 1)
    return f"; did you mean {near[0]}?" if near else "."
