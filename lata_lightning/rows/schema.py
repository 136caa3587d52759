"""The forms that a row of data may have, the same for every command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from lata_lightning.errors import LataError, first_three

RowForm = Literal["conversation", "pair", "text"]

FORMS: Mapping[tuple[str, ...], RowForm] = {
    ("messages",): "conversation",
    ("prompt", "completion"): "pair",
    ("prompt", "answer"): "pair",
    ("question", "answer"): "pair",
    ("question", "completion"): "pair",
    ("text",): "text",
}
"""The form that a set of columns makes; ``text`` may have a ``label`` beside it. Other columns are ignored."""
LABEL = "label"
ACCEPTED = "'messages', 'prompt' and 'completion', 'prompt' and 'answer', 'question' and 'answer', 'text', or 'text' and 'label'"


class Sample(NamedTuple):
    """One row of data in one of the accepted forms.

    Attributes:
        form: ``conversation``, ``pair`` or ``text``.
        messages: Turns with ``role`` and ``content``. A pair has the prompt of the user and the answer of the assistant; a text has none.
        text: The document; empty for the other forms.
        label: Class of a text, as a whole number or a word; None where the row has none.
    """

    form: RowForm
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    label: int | str | None = None

    @property
    def prompt(self) -> str:
        """The question of a pair."""
        return str(self.messages[0]["content"])

    @property
    def answer(self) -> str:
        """The answer of a pair."""
        return str(self.messages[1]["content"])


def pair(prompt: str, answer: str) -> Sample:
    """Return the sample for a question of the user and the answer of the assistant."""
    return Sample("pair", ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def check_columns(present: Sequence[str], columns: Sequence[str], *, where: str = "the data") -> None:
    """Refuse data that lacks one of the columns it needs.

    Args:
        present: The columns of the data.
        columns: The columns that it needs.
        where: What has these columns, for messages.

    Raises:
        LataError: A column is missing; the message lists the columns of the data.
    """
    missing = [column for column in columns if column not in present]
    if missing:
        raise LataError(f"{where} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, present))}")


def columns_of(present: Iterable[str], columns: Sequence[str] | None = None, *, where: str = "the data") -> tuple[str, ...]:
    """Return the columns that make a row.

    Args:
        present: The columns that have a value.
        columns: Columns named by the user; by default one of the accepted forms.
        where: What has these columns, for messages.

    Raises:
        LataError: The columns make no accepted form or several, or a named column is missing.
    """
    names = list(present)
    if columns is not None:
        check_columns(names, columns, where=where)
        return tuple(columns)
    forms = [form for form in FORMS if set(form) <= set(names)]
    if len(forms) > 1:
        raise LataError(
            f"{where} must hold one of the accepted forms, it holds {len(forms)}: {'; '.join(map(_words, forms))}. "
            "Remove the columns that are not meant (lata fit also takes their names: --data.columns)."
        )
    if not forms:
        raise LataError(f"{where} must hold {ACCEPTED}; it holds {_listed(names)}. {_nearest(names)}")
    return forms[0]


def read_sample(row: Mapping[str, Any], columns: Sequence[str] | None = None, *, where: str) -> Sample:
    """Read a row as a sample.

    Args:
        row: Values by column; None counts as absent.
        columns: One column of conversations or of texts, or two of prompts and answers; by default one of the accepted forms.
        where: Which row it is, for messages.

    Raises:
        LataError: The row has no accepted form or several, or a value is empty or of another type.
    """
    given = {name: value for name, value in row.items() if value is not None}
    empty = [column for column in columns or () if column in row and column not in given]
    if empty:
        raise LataError(f"{where} has nothing in column {empty[0]!r}; every row must have a value there")
    chosen = columns_of(given, columns, where=where)
    values = [given[column] for column in chosen]
    if len(chosen) == 2:
        wrong = [type(value).__name__ for value in values if not isinstance(value, str)]
        if wrong:
            raise LataError(f"{chosen[0]!r} and {chosen[1]!r} must be text; {where} holds a {wrong[0]} there")
        _check_filled(chosen, values, where)
        return pair(*values)
    _check_filled(chosen, values, where)
    value = values[0]
    if isinstance(value, str) and chosen != ("messages",):
        return Sample("text", text=value, label=None if columns is not None else _label(given, where))
    if chosen == ("text",):
        raise LataError(f"'text' must be text; {where} holds a {type(value).__name__} there")
    return Sample("conversation", _conversation(value, chosen[0], where))


def read_samples(rows: Iterable[Mapping[str, Any]], name: str, columns: Sequence[str] | None = None) -> list[Sample]:
    """Read rows as samples, all of one form.

    Args:
        rows: Values by column.
        name: Where they come from, for messages; rows are counted from 1.
        columns: As for ``read_sample``.

    Raises:
        LataError: As for ``read_sample``, or the rows are of several forms, or some texts have a label and some have none.
    """
    samples = [read_sample(row, columns, where=f"row {number} of {name}") for number, row in enumerate(rows, start=1)]
    check_one_form(samples, name)
    return samples


def check_one_form(samples: Sequence[Sample], name: str) -> None:
    """Refuse samples of several forms; conversations and pairs count as one form.

    Raises:
        LataError: The samples are of several forms.
    """
    kinds = [_kind(sample) for sample in samples]
    other = [number for number, kind in enumerate(kinds, start=1) if kind != kinds[0]]
    if other:
        first = other[0]
        raise LataError(
            f"all rows of {name} must have one form; row 1 holds {kinds[0]} and {len(other)} of {len(kinds)} rows another, "
            f"the first is row {first}, which holds {kinds[first - 1]}. Put them into files of their own."
        )


def _kind(sample: Sample) -> str:
    if sample.form != "text":
        return "a conversation"
    return "a text" if sample.label is None else "a text with a label"


def _conversation(value: Any, column: str, where: str) -> tuple[Mapping[str, Any], ...]:
    turns = value if isinstance(value, list | tuple) else ()
    if not turns or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise LataError(f"a conversation must be a list of turns with 'role' and 'content'; {where} has none in {column!r}")
    return tuple(turns)


def _label(row: Mapping[str, Any], where: str) -> int | str | None:
    label = row.get(LABEL)
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise LataError(f"a label must be a whole number or a word; {where} holds a {type(label).__name__}")
    return label


def _check_filled(columns: Sequence[str], values: Sequence[Any], where: str) -> None:
    empty = [column for column, value in zip(columns, values, strict=True) if value in ("", [])]
    if empty:
        raise LataError(f"{where} has nothing in column {empty[0]!r}; every row must have a value there")


def _nearest(names: Sequence[str]) -> str:
    """Return a sentence that names the accepted form with the most similar columns, and the columns it lacks."""

    def likeness(columns: tuple[str, ...]) -> float:
        best = [max((SequenceMatcher(None, column, name.lower()).ratio() for name in names), default=0.0) for column in columns]
        return sum(best) / len(columns)

    nearest = max(FORMS, key=likeness)
    missing = [column for column in nearest if column not in names]
    return f"The nearest form is {_words(nearest)}, of which {_words(missing)} {'is' if len(missing) == 1 else 'are'} missing."


def _words(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))


def _listed(names: Sequence[str]) -> str:
    return first_three(names) if names else "no column"
