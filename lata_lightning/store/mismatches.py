"""Errors about two sources of tensors that do not fit together: names, shapes or kinds of numbers differ."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from lata_lightning.errors import LayoutMismatchError, SourceError, differing, first_three
from lata_lightning.store.dtypes import readable_code
from lata_lightning.store.names import leave_out_pattern
from lata_lightning.store.sources import TensorSource

_VOCABULARY = re.compile(r"embed|wte|shared|lm_head|predictions")


def check_same_shapes(start: TensorSource, tuned: TensorSource) -> None:
    """Refuse two sources, under one set of names, in which a tensor has different shapes.

    Raises:
        LayoutMismatchError: At least one tensor has.
    """
    odd = [name for name in start.names if start.shape(name) != tuned.shape(name)]
    if not odd:
        return
    vocabulary = [name for name in odd if _VOCABULARY.search(name)]
    name = (vocabulary or odd)[0]
    one, other = start.shape(name), tuned.shape(name)
    if vocabulary and len(one) == len(other) == 2 and one[1:] == other[1:]:
        raise LayoutMismatchError(
            f"{start.label} and {tuned.label} must have the same vocabulary; {name} has {one[0]} rows in one and {other[0]} in the other. "
            "Resize the token embeddings of one of them first, or say whose rows to keep (--vocabulary of lata extract, merge and forget)."
        )
    pattern = leave_out_pattern(odd, [entry for entry in start.names if entry not in odd])
    advice = "" if pattern is None else f". {_leave_out(pattern)}"
    raise LayoutMismatchError(
        f"{start.label} and {tuned.label} must have the same shapes; {differing(odd, len(start.names))}; shapes of {name}: {one} and {other}{advice}"
    )


def check_same_tensors(one: TensorSource, other: TensorSource) -> None:
    """Refuse two vectors whose tensors differ in names or shapes.

    Raises:
        LayoutMismatchError: They differ; the message names the first three tensors.
    """
    lone = set(one.names) ^ set(other.names)
    if lone:
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must hold the same tensors; on one side only are {first_three(lone)}. Were both made from one base model?"
        )
    odd = {name for name in one.names if one.shape(name) != other.shape(name)}
    if odd:
        name = min(odd)
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must have the same shapes; {differing(odd, len(one.names))}; shapes of {name}: {one.shape(name)} and "
            f"{other.shape(name)}. Do both have the same vocabulary and sizes?"
        )


def check_kinds(start: TensorSource, tuned: TensorSource) -> None:
    """Refuse tensors whose dtypes cannot be read, or that are floating on one side only.

    Raises:
        SourceError: A dtype cannot be read.
        LayoutMismatchError: A tensor has floating numbers on one side and integers on the other.
    """
    unusable = {name for name in start.names for side in (start, tuned) if readable_code(side.dtype(name)) is None}
    if unusable:
        raise SourceError(
            f"{start.label} and {tuned.label} must hold plain floating or integer tensors; other dtypes have {first_three(unusable)}. Convert them first."
        )
    mixed = [name for name in start.names if start.dtype(name).is_floating_point != tuned.dtype(name).is_floating_point]
    if mixed:
        raise LayoutMismatchError(
            f"{start.label} and {tuned.label} must both hold weights as floating numbers; integers on one side only are {first_three(mixed)}. "
            "Is one of them quantised?"
        )


def lone_tensors(start: TensorSource, tuned: TensorSource, lone: Iterable[str], paired: Sequence[str]) -> LayoutMismatchError:
    """Return the error about tensors that only one of two models has.

    Args:
        start: The start model.
        tuned: The tuned model.
        lone: Names of the tensors that only one of them has.
        paired: Names of the tensors that both have.
    """
    lone = sorted(lone)
    pattern = leave_out_pattern(lone, paired)
    advice = "Are both of one architecture?" if pattern is None else _leave_out(pattern)
    return LayoutMismatchError(
        f"{start.label} and {tuned.label} must hold the same tensors; on one side only are {first_three(lone)}. {advice}"
    )


def _leave_out(pattern: str) -> str:
    return f"If these are heads of different tasks, leave them out: --leave-out {shlex.quote(pattern)} (leave_out=… in Python)."
