"""Bringing two sources under one set of names, or saying why that cannot be."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lata_lightning.errors import LayoutMismatchError, SourceError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.store.checkpoint_names import ignored_on_load
from lata_lightning.store.converted import Named, by_checkpoint_names
from lata_lightning.store.dtypes import readable_code
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.names import (
    NOTHING,
    LeaveOut,
    current_spelling,
    differing_prefixes,
    keyed,
    leave_out_pattern,
    restored,
)
from lata_lightning.store.roles import Role, is_counter, named_role, roles_of
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.ties import Ties, same_values
from lata_lightning.store.views import View


@dataclass(frozen=True)
class Pairing:
    """Two sources under one set of names.

    Attributes:
        start, tuned: The tensors that both hold.
        left_out: Names, as each side has them, of tensors outside the model that both hold, which one side has alone.
        copies: Names in the start of tensors that are stored a second time, as tied weights may be, and count once.
    """

    start: View
    tuned: View
    left_out: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


def pair(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> tuple[TensorSource, TensorSource]:
    """Two sources under one set of names, as ``match``, with tensors of one shape each.

    Raises:
        LayoutMismatchError: Names or shapes differ otherwise.
    """
    found = match(start, tuned, leave_out)
    check_same_shapes(found)
    return found.start, found.tuned


def pair_names(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> tuple[TensorSource, TensorSource]:
    """As ``pair``, but the tensors may differ in shape."""
    found = match(start, tuned, leave_out)
    return found.start, found.tuned


def check_same_shapes(found: Pairing) -> None:
    """Refuse a pairing in which a tensor has two shapes.

    Raises:
        LayoutMismatchError: At least one has.
    """
    start, tuned = found.start, found.tuned
    odd = [name for name in start.names if start.shape(name) != tuned.shape(name)]
    if odd:
        raise LayoutMismatchError(_shape_message(start, tuned, odd))


def match(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> Pairing:
    """Bring two sources under one set of names: those of the start, or those of the tuned side where only that is a whole model's.

    Names that wrappers, older releases and Lightning changed are understood; so are a prefix that one side has alone, and names and pieces of a
    checkpoint on one side against those of the modules on the other. A tied tensor that is stored twice counts once. Tables that the model computes by
    itself are left out.

    Args:
        start: The one side; nothing is read but tensors that may be stored twice.
        tuned: The other.
        leave_out: What to leave out of both sides.

    Returns:
        The tensors that both hold; their shapes may differ.

    Raises:
        LayoutMismatchError: Names differ otherwise.
        SourceError: A tensor is of a dtype that cannot be read.
    """
    attempt = _best_attempt(start, tuned, leave_out)
    if attempt.lone:
        raise LayoutMismatchError(_lone_message(start, tuned, attempt.lone, attempt.paired))
    found = attempt.pairing()
    _check_kinds(found.start, found.tuned)
    return found


def unmatched(start: TensorSource, tuned: TensorSource) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the tensors of each of two sides for which the other side has no partner, as each side has them."""
    return _best_attempt(start, tuned, NOTHING).alone


def _best_attempt(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut) -> _Attempt:
    sides = Named(start, keyed(start.names, start.label)), Named(tuned, keyed(tuned.names, tuned.label))
    attempt = _Attempt(*sides, leave_out)
    # Each side by its own config first; a bare model and one with a head may convert their names in different ways.
    for one, other in ((start, tuned), (start, start), (tuned, tuned)):
        if not attempt.lone:
            break
        known = by_checkpoint_names(start, one.config or other.config), by_checkpoint_names(tuned, other.config or one.config)
        attempt = min(attempt, _Attempt(known[0] or sides[0], known[1] or sides[1], leave_out), key=lambda found: len(found.lone))
    if attempt.lone:
        attempt.pass_over(start if start.config is not None else tuned)
    return attempt


class _Attempt:
    """One way of naming both sides, and what it leaves without a partner.

    Args:
        one: The start.
        other: The tuned side.
        leave_out: What to leave out.

    Attributes:
        common: Keys, without prefixes, that both sides have.
        paired: Names of the tensors that have a partner, as each side has them.
        lone: Names of tensors that have no partner and need one.
    """

    def __init__(self, one: Named, other: Named, leave_out: LeaveOut) -> None:
        self.start, self.tuned, self._leave_out = one.source, other.source, leave_out
        keys = [self._kept(_candidates(side.source, side.names)) for side in (one, other)]
        inside = [
            {key: name for key, name in names.items() if name not in side.outside} for names, side in zip(keys, (one, other), strict=True)
        ]
        self._tuned_prefix, self._start_prefix = differing_prefixes(inside[1], inside[0], other.source.label)
        self._start_names = self._kept(restored(inside[0], self._start_prefix))
        self._tuned_names = self._kept(restored(inside[1], self._tuned_prefix))
        self.common = [key for key in self._start_names if key in self._tuned_names]
        self.paired = [names[key] for names in (self._start_names, self._tuned_names) for key in self.common]
        self._copies: list[str] = []
        outside = []
        for side, names, prefix in ((one, keys[0], self._start_prefix), (other, keys[1], self._tuned_prefix)):
            beside = [name for key, name in names.items() if name in side.outside or not key.startswith(prefix)]
            outside.append([name for name in beside if _counts(side.source, name)])
        self.lone = {*self._alone(self.start, self._start_names), *self._alone(self.tuned, self._tuned_names)}
        if all(outside):
            # Each side has something of its own: nothing says that these are not the same under two names.
            self.lone |= {*outside[0], *outside[1]}
        self._outside: tuple[str, ...] = (*outside[0], *outside[1])

    @property
    def alone(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the start and of the tuned side that have no partner, whether they need one or not."""
        alone = {*self.lone, *self._outside}
        start, tuned = ({names[key] for key in self.common} for names in (self._start_names, self._tuned_names))
        return frozenset(alone & set(self.start.names) - start), frozenset(alone & set(self.tuned.names) - tuned)

    def pairing(self) -> Pairing:
        """Both sides under one set of names."""
        # A directory is named as its config says; a state dict or a Lightning checkpoint may have the model under a prefix of its own.
        by_tuned = self.start.config is None and self.tuned.config is not None
        names = self._tuned_names if by_tuned else self._start_names
        shown = {key: unwrapped(names[key]) for key in self.common}
        if self.start.config is None and not by_tuned:
            shown = {key: name.removeprefix(self._start_prefix) for key, name in shown.items()}
        start = {shown[key]: self._start_names[key] for key in self.common}
        tuned = {shown[key]: self._tuned_names[key] for key in self.common}
        return Pairing(View(self.start, start), View(self.tuned, tuned), self._outside, tuple(self._copies))

    def pass_over(self, model: TensorSource) -> None:
        """Count tensors as outside of the model that transformers passes over when it loads a checkpoint of it."""
        module = meta_model(model.config)
        ignored = set() if module is None else ignored_on_load(module, self.lone)
        self.lone -= ignored
        self._outside = (*self._outside, *sorted(ignored))

    def _kept(self, names: Mapping[str, str]) -> dict[str, str]:
        return {key: name for key, name in names.items() if not self._leave_out(key) and not self._leave_out(name)}

    def _alone(self, side: TensorSource, names: Mapping[str, str]) -> list[str]:
        """Names of the tensors of a side that have no partner and need one."""
        paired = {names[key] for key in self.common}
        lone = {key: name for key, name in names.items() if name not in paired and _counts(side, name)}
        if not lone:
            return []
        tied = Ties((self.start, self.tuned))
        for key, name in list(lone.items()):
            if any(tied(key, other) and same_values(side, name, names[other]) for other in self.common):
                del lone[key]
                self._copies.extend([name] if side is self.start else [])
        return sorted(lone.values())


def _counts(side: TensorSource, name: str) -> bool:
    """Whether a tensor is a part of the model that needs a partner: no table, no counter."""
    return named_role(name, side.shape(name), side.dtype(name)) != "table" and not is_counter(name)


def _check_kinds(start: TensorSource, tuned: TensorSource) -> None:
    """Refuse tensors that are no plain numbers, or are floating on one side only."""
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


def _lone_message(start: TensorSource, tuned: TensorSource, lone: Iterable[str], paired: Sequence[str]) -> str:
    lone = sorted(lone)
    pattern = leave_out_pattern(lone, paired)
    advice = (
        "Are both of one architecture?"
        if pattern is None
        else f"If these are heads of different tasks, leave them out: --leave-out {shlex.quote(pattern)} (leave_out=… in Python)."
    )
    return f"{start.label} and {tuned.label} must hold the same tensors; on one side only are {first_three(lone)}. {advice}"


def _shape_message(start: TensorSource, tuned: TensorSource, odd: list[str]) -> str:
    name = odd[0]
    one, other = start.shape(name), tuned.shape(name)
    vocabulary = [entry for entry in odd if _VOCABULARY.search(entry)]
    if vocabulary:
        name = vocabulary[0]
        one, other = start.shape(name), tuned.shape(name)
        if len(one) == len(other) == 2 and one[1:] == other[1:]:
            return (
                f"{start.label} and {tuned.label} must have the same vocabulary; {name} has {one[0]} rows in one and {other[0]} in the other. "
                "Resize the token embeddings of one of them first, or say whose rows to keep (--vocabulary of lata extract, merge and forget)."
            )
    pattern = leave_out_pattern(odd, [entry for entry in start.names if entry not in odd])
    advice = (
        ""
        if pattern is None
        else f". If these are heads of different tasks, leave them out: --leave-out {shlex.quote(pattern)} (leave_out=… in Python)."
    )
    return f"{start.label} and {tuned.label} must have the same shapes; different are {first_three(odd)}, {name} with {one} and {other}{advice}"


_VOCABULARY = re.compile(r"embed|wte|shared|lm_head|predictions")


def named_like(source: TensorSource, reference: TensorSource) -> TensorSource:
    """A source under the names that a reference has for its tensors, without the names that wrappers add.

    Of a state dict or checkpoint the prefix of the model is taken off, and what lies outside of it is left out; each tied tensor gets the name that
    the reference has for it. A directory keeps its names.
    """
    names, prefix = _candidates(source, keyed(source.names, source.label)), ""
    wanted = keyed(reference.names, reference.label)
    if source.directory is None:
        found, missing = differing_prefixes(names, wanted, source.label)
        # Where the reference has a prefix too, nothing says that what lies outside of the prefix is no part of the model.
        prefix = "" if missing else found
    chosen: dict[str, str] = {}
    for key, stored in restored(names, prefix).items():
        if stored not in chosen or (key in wanted and chosen[stored] not in wanted):
            chosen[stored] = key
    own = {stored: unwrapped(stored) for stored in chosen}
    shown = {
        stored: own[stored].removeprefix(prefix) if current_spelling(own[stored]) == prefix + key else key for stored, key in chosen.items()
    }
    return View(source, {name: stored for stored, name in shown.items()})


def _candidates(side: TensorSource, names: Mapping[str, str]) -> dict[str, str]:
    """Stored names by key; a tied tensor in memory stands under each of its names."""
    found, stored = dict(names), set(side.names)
    for key, alias in keyed(side.tied, side.label).items():
        if side.tied[alias] in stored:
            found.setdefault(key, side.tied[alias])
    return found


def measured_names(
    found: Pairing, modules: Sequence[nn.Module], config: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of what a vector holds of two paired sources: weights and buffers; and those of the buffers among them.

    Args:
        found: Both sources.
        modules: Modules that are one of them, where they are at hand.
        config: Of the model.

    Raises:
        LayoutMismatchError: Integers of which nothing is known differ.
    """
    start, tuned = found.start, found.tuned
    roles: dict[str, Role] = {}
    for side in (start, tuned):
        stored = {name: side.origin_name(name) for name in side.names}
        told = roles_of([(stored[name], side.shape(name), side.dtype(name)) for name in side.names], modules, config)
        # What is a buffer on either side is no weight.
        roles |= {name: told[stored[name]] for name in side.names if roles.get(name, "weight") == "weight"}
    for name, role in roles.items():
        if role == "integers" and not torch.equal(start.read(name), tuned.read(name)):
            raise LayoutMismatchError(f"{name} holds integers, which must be equal in {start.label} and {tuned.label}")
    floating = tuple(name for name, role in roles.items() if role in ("weight", "state") and start.dtype(name).is_floating_point)
    return floating, frozenset(name for name in floating if roles[name] == "state")


def brought_to(vector: TensorSource, other: TensorSource, leave_out: LeaveOut = NOTHING) -> View:
    """The tensors of another vector under the names of a vector.

    Args:
        vector: Whose names to take.
        other: The other one; it may hold more than the vector: what was left out of that.
        leave_out: What need not be in both.

    Raises:
        LayoutMismatchError: A tensor is on one side only, or has two shapes.
    """
    try:
        found = match(vector, other, leave_out)
        check_same_shapes(found)
    except LayoutMismatchError:
        # Of vectors the question is another one than of models.
        check_same_tensors(vector, other)
        raise
    return View(found.tuned, {found.start.origin_name(name): name for name in found.start.names})


def check_same_tensors(one: TensorSource, other: TensorSource) -> None:
    """Refuse the tensors of two vectors that differ in names or shapes; the message names the first three tensors."""
    lone = set(one.names) ^ set(other.names)
    if lone:
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must hold the same tensors; on one side only are {first_three(lone)}. Were both made from one base model?"
        )
    odd = {name for name in one.names if one.shape(name) != other.shape(name)}
    if odd:
        name = min(odd)
        raise LayoutMismatchError(
            f"{one.label} and {other.label} must have the same shapes; different are {first_three(odd)}, {name} with {one.shape(name)} and "
            f"{other.shape(name)}. Do both have the same vocabulary and sizes?"
        )
