"""The errors of this package: each says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
    return f"{len(listed)}: {_beginning(listed)}"


def differing(names: Iterable[str], total: int | None = None, what: str = "tensors") -> str:
    """Return how many of several things differ, and the first three of them, for an error message: ``2 of 57 tensors differ: ['a', 'b']``.

    Args:
        names: Names of those that differ.
        total: How many there are in all; None leaves this out.
        what: What they are, in the plural.
    """
    listed = sorted(names)
    among = "" if total is None else f" of {total} {what}"
    return f"{len(listed)}{among} {'differs' if len(listed) == 1 else 'differ'}{', first' if len(listed) > 3 else ''}: {_beginning(listed)}"


def _beginning(listed: Sequence[str]) -> str:
    return f"[{', '.join(map(repr, listed[:3]))}{', …' if len(listed) > 3 else ''}]"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the name of the error where it has none; for an error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the choice most similar to a word, or a full stop if none is similar; for an error message."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(choices), 1)
    return f"; did you mean {near[0]}?" if near else "."
