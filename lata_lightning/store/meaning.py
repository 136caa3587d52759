"""What config and tokenizer say about the tensors of a model: equal shapes need not mean the same. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.store.configs import config_differences, relevant
from lata_lightning.store.directories import local_directory
from lata_lightning.store.tokens import TokenizerIdentity

if TYPE_CHECKING:
    from lata_lightning.store.sources import TensorSource

_NO_COMPARISON = "switch the comparison of configs off (check_config=False, --check-config false)"


@dataclass(frozen=True)
class Meaning:
    """What is known of the function whose weights the tensors of a vector or a model are.

    Attributes:
        config: Content of config.json; None if it is not known.
        vocabularies: The known tokenizers: that of a model, or those of both sides of a vector, each once. Where only one side has a token, its row
            is zero in the vector.
        compared: Whether the config takes part in comparisons. It is not recorded.
    """

    config: Mapping[str, Any] | None = None
    vocabularies: tuple[TokenizerIdentity, ...] = ()
    compared: bool = field(default=True, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON, with the keys of the config that count."""
        return {
            "config": None if self.config is None else relevant(self.config),
            "vocabularies": [vocabulary.to_json() for vocabulary in self.vocabularies],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Meaning:
        """Read what ``to_json`` wrote."""
        config = data["config"]
        if config is not None and not isinstance(config, Mapping):
            raise ValueError("a config that is no object")
        return cls(config, tuple(TokenizerIdentity.from_json(entry) for entry in data["vocabularies"]))


def meaning_of(source: TensorSource) -> Meaning:
    """Return the meaning of whole weights, from the config and the tokenizer files of their directory."""
    return _meaning(source.config, source.directory, source.label)


def meaning_in_memory(config: Mapping[str, Any] | None, location: str | None) -> Meaning:
    """Return the meaning of a model in memory, from its config and the directory or hub id it was loaded from, if there are any."""
    return _meaning(config, local_directory(location), location or "the model in memory")


def _meaning(config: Mapping[str, Any] | None, directory: Path | None, label: str) -> Meaning:
    vocabulary = None if directory is None else TokenizerIdentity.of_directory(directory, label, rows_of(config))
    return Meaning(config, () if vocabulary is None else (vocabulary,))


def rows_of(config: Mapping[str, Any] | None) -> int | None:
    """Return the largest vocabulary size that a config states; None if it states none."""
    return max(stated_sizes(config or {}).values(), default=None)


def difference_meaning(start: TensorSource, tuned: TensorSource, *, compared: bool = True) -> Meaning:
    """Return the meaning of the difference of two models, which must mean the same.

    Args:
        start: The start model.
        tuned: The tuned model.
        compared: Whether configs are compared, now and wherever the difference is used; it is not recorded.

    Raises:
        LayoutMismatchError: As ``check_same_meaning``.
    """
    left, right = replace(meaning_of(start), compared=compared), meaning_of(tuned)
    check_same_meaning((start.label, left), (tuned.label, right))
    return Meaning(right.config if left.config is None else left.config, left.vocabularies or right.vocabularies, compared)


def check_all_mean_the_same(sides: Sequence[tuple[str, Meaning]], *, by_token: bool = True) -> None:
    """Compare every pair of several models and vectors (see ``check_same_meaning``)."""
    for one, other in combinations(sides, 2):
        check_same_meaning(one, other, by_token=by_token)


def check_same_meaning(one: tuple[str, Meaning], other: tuple[str, Meaning], *, by_token: bool = True) -> None:
    """Refuse two models or vectors that are known to be weights of different functions.

    Args:
        one: Name and meaning of a model or a vector. For a vector, it is enough that one of its sides has the same tokens.
        other: Name and meaning of the other.
        by_token: Whether to compare tokenizers; False where rows are compared one by one.

    Raises:
        LayoutMismatchError: The configs differ in a key that changes what the weights compute, or a row is a different token in each.
    """
    (label, left), (other_label, right) = one, other
    if left.compared and right.compared and left.config is not None and right.config is not None:
        changed = config_differences(left.config, right.config)
        if changed:
            shown = "; ".join(f"{key} is {_short(values[0])} and {_short(values[1])}" for key, values in list(changed.items())[:3])
            raise LayoutMismatchError(
                f"{label} and {other_label} must compute the same function of their weights; their configs differ in {len(changed)} keys that change it: "
                f"{shown}{'; …' if len(changed) > 3 else ''}. Use models of one config; or, if you know that the difference does not matter, "
                f"{_NO_COMPARISON}."
            )
    if not by_token or not left.vocabularies or not right.vocabularies:
        return
    if not any(mine == theirs for mine in left.vocabularies for theirs in right.vocabularies):
        refuse_tokens(label, left.vocabularies[-1], other_label, right.vocabularies[-1])


def refuse_tokens(label: str, one: TokenizerIdentity, other_label: str, other: TokenizerIdentity) -> NoReturn:
    """Raise the error that says how two tokenizers differ.

    Raises:
        LayoutMismatchError: Always.
    """
    left, right = one.compared_with(other), other.compared_with(one)
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
                f"{seen[first][0]} and {label} must have the same token at the same row; {len(clashes)} rows differ, first: {shown}. Rows are not "
                "moved: give both models the same tokens at the same rows before training them."
            )
        for row, token in tokens.items():
            seen.setdefault(row, (label, token))


def stated_sizes(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Return every vocabulary size in a config by its keys: at the top, or in the config of a part such as the text model."""
    sizes: dict[tuple[str, ...], int] = {}
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            sizes[(key,)] = value
        elif isinstance(value, Mapping):
            sizes |= {(key, *rest): size for rest, size in stated_sizes(value).items()}
    return sizes


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
