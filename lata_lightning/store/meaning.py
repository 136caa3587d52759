"""What config and tokenizer say about the tensors of a model: equal shapes are not equal meaning. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.store.configs import config_differences, relevant
from lata_lightning.store.directories import local_directory
from lata_lightning.store.tokens import Vocabulary

if TYPE_CHECKING:
    from lata_lightning.store.sources import TensorSource

_NO_COMPARISON = "switch the comparison of configs off (check_config=False, --check-config false)"


@dataclass(frozen=True)
class Meaning:
    """What is known of the function that the tensors of a vector, or of a model, are weights of.

    Attributes:
        config: Content of config.json; None if it is not known.
        vocabularies: The tokenizers that are known: of a model its own, of a vector those of its sides, each once. Rows of tokens that only one of
            two sides has are zero in a vector.
        compared: Whether the config takes part in comparisons. It is not recorded.
    """

    config: Mapping[str, Any] | None = None
    vocabularies: tuple[Vocabulary, ...] = ()
    compared: bool = field(default=True, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON; of the config, the keys that count."""
        return {
            "config": None if self.config is None else relevant(self.config),
            "vocabularies": [vocabulary.to_json() for vocabulary in self.vocabularies],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Meaning:
        """The inverse of ``to_json``."""
        config = data["config"]
        if config is not None and not isinstance(config, Mapping):
            raise ValueError("a config that is no object")
        return cls(config, tuple(Vocabulary.from_json(entry) for entry in data["vocabularies"]))


def meaning_of(source: TensorSource) -> Meaning:
    """That of whole weights, from the config and the tokenizer files beside them."""
    return _meaning(source.config, source.directory, source.label)


def meaning_in_memory(config: Mapping[str, Any] | None, location: str | None) -> Meaning:
    """That of a model in memory, which has a config and was loaded from a directory or hub id, as far as that is at hand."""
    return _meaning(config, local_directory(location), location or "the model in memory")


def _meaning(config: Mapping[str, Any] | None, directory: Path | None, label: str) -> Meaning:
    vocabulary = None if directory is None else Vocabulary.of_directory(directory, label, rows_of(config))
    return Meaning(config, () if vocabulary is None else (vocabulary,))


def rows_of(config: Mapping[str, Any] | None) -> int | None:
    """The largest vocabulary size that a config states; None if it states none."""
    return max(stated_sizes(config or {}).values(), default=None)


def difference_meaning(start: TensorSource, tuned: TensorSource, *, compared: bool = True) -> Meaning:
    """That of a difference of two models, which must mean the same.

    Args:
        start: The one side.
        tuned: The other.
        compared: Whether configs are compared, now and wherever the difference is used; it is not recorded.

    Raises:
        LayoutMismatchError: As ``check_same_meaning``.
    """
    left, right = replace(meaning_of(start), compared=compared), meaning_of(tuned)
    check_same_meaning((start.label, left), (tuned.label, right))
    return Meaning(right.config if left.config is None else left.config, left.vocabularies or right.vocabularies, compared)


def check_all_mean_the_same(sides: Sequence[tuple[str, Meaning]], *, by_token: bool = True) -> None:
    """Compare each two of several models and vectors (see ``check_same_meaning``)."""
    for one, other in combinations(sides, 2):
        check_same_meaning(one, other, by_token=by_token)


def check_same_meaning(one: tuple[str, Meaning], other: tuple[str, Meaning], *, by_token: bool = True) -> None:
    """Refuse two sets of tensors, each with its name, that are weights of different functions, as far as that is known.

    Args:
        one: Name and meaning of a model or a vector. A vector shares the tokens of either of its sides.
        other: The same of the other.
        by_token: Whether to compare tokenizers; False where that is done row by row, for a choice of rows that was asked for.

    Raises:
        LayoutMismatchError: A key of the configs differs that changes what the weights compute, or a row is another token in each.
    """
    (label, left), (other_label, right) = one, other
    if left.compared and right.compared and left.config is not None and right.config is not None:
        found = config_differences(left.config, right.config)
        if found:
            shown = "; ".join(f"{key} is {_short(values[0])} and {_short(values[1])}" for key, values in list(found.items())[:3])
            raise LayoutMismatchError(
                f"{label} and {other_label} must compute the same function of their weights; their configs differ in {len(found)} keys that change it: "
                f"{shown}{'; …' if len(found) > 3 else ''}. Use models of one config; or, if you know that the difference does not matter, "
                f"{_NO_COMPARISON}."
            )
    if not by_token or not left.vocabularies or not right.vocabularies:
        return
    if not any(mine == theirs for mine in left.vocabularies for theirs in right.vocabularies):
        refuse_tokens(label, left.vocabularies[-1], other_label, right.vocabularies[-1])


def refuse_tokens(label: str, one: Vocabulary, other_label: str, other: Vocabulary) -> NoReturn:
    """Say how two tokenizers differ.

    Raises:
        LayoutMismatchError: Always.
    """
    left, right = one.beside(other), other.beside(one)
    if left is None or right is None:
        unread = [side.tokens.unknown for side in (one, other) if side.hash is None]
        what = f", and {'; '.join(unread)}" if unread else f": {one.count} and {other.count} tokens"
        raise LayoutMismatchError(
            f"{label} and {other_label} must have the same tokens at the same rows; their tokenizers differ{what}. Where only some tokens were added, "
            "give the tuned models themselves and say whose rows to keep (--vocabulary of lata extract, merge and forget)."
        )
    check_same_tokens([(label, left), (other_label, right)])
    lone = sorted(set(left) ^ set(right))
    shown = ", ".join(f"{row} is {(left.get(row) or right.get(row))!r}" for row in lone[:3])
    raise LayoutMismatchError(
        f"{label} and {other_label} must have the same tokens; {len(lone)} are on one side only, although both may have rows for them, first: {shown}. "
        "Say whose tokens to keep (--vocabulary of lata extract, merge and forget)."
    )


def check_same_tokens(sides: Sequence[tuple[str, Mapping[int, str]]]) -> None:
    """Refuse tokenizers in which one row is two tokens.

    Args:
        sides: Name and token by row of each model.
    """
    seen: dict[int, tuple[str, str]] = {}
    for label, tokens in sides:
        clashes = [row for row, token in tokens.items() if row in seen and seen[row][1] != token]
        if clashes:
            first = min(clashes)
            shown = ", ".join(f"{row} is {seen[row][1]!r} and {tokens[row]!r}" for row in sorted(clashes)[:3])
            raise LayoutMismatchError(
                f"{seen[first][0]} and {label} must mean the same token by the same row; {len(clashes)} rows differ, first: {shown}. Rows are not "
                "moved: give both models the same tokens at the same rows before training them."
            )
        for row, token in tokens.items():
            seen.setdefault(row, (label, token))


def stated_sizes(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Every vocabulary size in a config, by where it stands: at the top, or in the config of a part such as the text model."""
    found: dict[tuple[str, ...], int] = {}
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            found[(key,)] = value
        elif isinstance(value, Mapping):
            found |= {(key, *rest): size for rest, size in stated_sizes(value).items()}
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
