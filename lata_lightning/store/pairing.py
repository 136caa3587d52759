"""Bringing two sources under one set of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.layers import unwrapped
from lata_lightning.store.checkpoint_names import ignored_on_load
from lata_lightning.store.converted import Named, by_checkpoint_names
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.mismatches import check_kinds, check_same_shapes, check_same_tensors, lone_tensors
from lata_lightning.store.names import (
    NOTHING,
    LeaveOut,
    current_spelling,
    differing_prefixes,
    keyed,
    restored,
)
from lata_lightning.store.roles import Role, is_counter, named_role, roles_of
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.ties import Ties, equal_tensors
from lata_lightning.store.views import View


@dataclass(frozen=True)
class Pairing:
    """Two sources under one set of names.

    Attributes:
        start, tuned: The tensors that both have.
        left_out: Names, as each side has them, of tensors that only one side has, outside the common model.
        copies: Names in the start of tied tensors that are stored a second time and count once.
    """

    start: View
    tuned: View
    left_out: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


def pair(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> tuple[TensorSource, TensorSource]:
    """Return two sources under one set of names and of equal shapes (see ``match``).

    Raises:
        LayoutMismatchError: Names or shapes differ otherwise.
    """
    pairing = match(start, tuned, leave_out)
    check_same_shapes(pairing.start, pairing.tuned)
    return pairing.start, pairing.tuned


def pair_names(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> tuple[TensorSource, TensorSource]:
    """Return two sources under one set of names; shapes may differ."""
    pairing = match(start, tuned, leave_out)
    return pairing.start, pairing.tuned


def match(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut = NOTHING) -> Pairing:
    """Bring two sources under one set of names: those of the start, or those of the tuned side where only that is a whole model's.

    Names that wrappers, older releases and Lightning changed are recognised. So is a prefix that only one side has, and a checkpoint on one side, with its
    names and pieces, against modules on the other. A tied tensor that is stored twice counts once; to tell, the values of both copies are
    read, and no other values. Tables that the model computes by itself are left out.

    Args:
        start: The start model.
        tuned: The tuned model.
        leave_out: What to leave out of both sides.

    Returns:
        The tensors that both have; their shapes may differ.

    Raises:
        LayoutMismatchError: Names differ otherwise.
        SourceError: A tensor has a dtype that cannot be read.
    """
    attempt = _best_attempt(start, tuned, leave_out)
    if attempt.lone:
        raise lone_tensors(start, tuned, attempt.lone, attempt.paired)
    pairing = attempt.pairing()
    check_kinds(pairing.start, pairing.tuned)
    return pairing


def unmatched(start: TensorSource, tuned: TensorSource) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the tensors that only the one source has, and of those that only the other has."""
    return _best_attempt(start, tuned, NOTHING).alone


def _best_attempt(start: TensorSource, tuned: TensorSource, leave_out: LeaveOut) -> _Attempt:
    sides = Named(start, keyed(start.names, start.label)), Named(tuned, keyed(tuned.names, tuned.label))
    attempt = _Attempt(*sides, leave_out)
    # Each side by its own config first; a bare model and one with a head may convert their names in different ways.
    for one, other in ((start, tuned), (start, start), (tuned, tuned)):
        if not attempt.lone:
            break
        known = by_checkpoint_names(start, one.config or other.config), by_checkpoint_names(tuned, other.config or one.config)
        attempt = min(attempt, _Attempt(known[0] or sides[0], known[1] or sides[1], leave_out), key=lambda other: len(other.lone))
    if attempt.lone:
        attempt.leave_out_ignored(start if start.config is not None else tuned)
    return attempt


class _Attempt:
    """One way of naming both sides, and the tensors that it leaves without a partner.

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
        keys = [self._without_left_out(_candidates(side.source, side.names)) for side in (one, other)]
        inside = [
            {key: name for key, name in names.items() if name not in side.outside} for names, side in zip(keys, (one, other), strict=True)
        ]
        self._tuned_prefix, self._start_prefix = differing_prefixes(inside[1], inside[0], other.source.label)
        self._start_names = self._without_left_out(restored(inside[0], self._start_prefix))
        self._tuned_names = self._without_left_out(restored(inside[1], self._tuned_prefix))
        self.common = [key for key in self._start_names if key in self._tuned_names]
        self.paired = [names[key] for names in (self._start_names, self._tuned_names) for key in self.common]
        self._copies: list[str] = []
        outside = []
        for side, names, prefix in ((one, keys[0], self._start_prefix), (other, keys[1], self._tuned_prefix)):
            others = [name for key, name in names.items() if name in side.outside or not key.startswith(prefix)]
            outside.append([name for name in others if _counts(side.source, name)])
        self.lone = {*self._alone(self.start, self._start_names), *self._alone(self.tuned, self._tuned_names)}
        if all(outside):
            # Each side has tensors of its own: they may be the same tensors under two names.
            self.lone |= {*outside[0], *outside[1]}
        self._outside: tuple[str, ...] = (*outside[0], *outside[1])

    @property
    def alone(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the start and of the tuned side that have no partner, needed or not."""
        alone = {*self.lone, *self._outside}
        start, tuned = ({names[key] for key in self.common} for names in (self._start_names, self._tuned_names))
        return frozenset(alone & set(self.start.names) - start), frozenset(alone & set(self.tuned.names) - tuned)

    def pairing(self) -> Pairing:
        """Return both sides under one set of names."""
        # The names in a directory are those of its config; a state dict or a Lightning checkpoint may have the model under a prefix.
        by_tuned = self.start.config is None and self.tuned.config is not None
        names = self._tuned_names if by_tuned else self._start_names
        shown = {key: unwrapped(names[key]) for key in self.common}
        if self.start.config is None and not by_tuned:
            shown = {key: name.removeprefix(self._start_prefix) for key, name in shown.items()}
        start = {shown[key]: self._start_names[key] for key in self.common}
        tuned = {shown[key]: self._tuned_names[key] for key in self.common}
        return Pairing(View(self.start, start), View(self.tuned, tuned), self._outside, tuple(self._copies))

    def leave_out_ignored(self, model: TensorSource) -> None:
        """Count tensors as outside of the model that transformers ignores when it loads a checkpoint of it."""
        module = meta_model(model.config)
        ignored = set() if module is None else ignored_on_load(module, self.lone)
        self.lone -= ignored
        self._outside = (*self._outside, *sorted(ignored))

    def _without_left_out(self, names: Mapping[str, str]) -> dict[str, str]:
        return {key: name for key, name in names.items() if not self._leave_out(key) and not self._leave_out(name)}

    def _alone(self, side: TensorSource, names: Mapping[str, str]) -> list[str]:
        """Return the names of the tensors of a side that have no partner and need one."""
        paired = {names[key] for key in self.common}
        lone = {key: name for key, name in names.items() if name not in paired and _counts(side, name)}
        if not lone:
            return []
        tied = Ties((self.start, self.tuned))
        for key, name in list(lone.items()):
            if any(tied(key, other) and equal_tensors(side, name, names[other]) for other in self.common):
                del lone[key]
                self._copies.extend([name] if side is self.start else [])
        return sorted(lone.values())


def _counts(side: TensorSource, name: str) -> bool:
    """Return whether a tensor needs a partner: it is neither a table nor a counter."""
    return named_role(name, side.shape(name), side.dtype(name)) != "table" and not is_counter(name)


def named_like(source: TensorSource, reference: TensorSource) -> TensorSource:
    """Return a source under the names that a reference has for its tensors, without what wrappers add to names.

    The prefix of the model in a state dict or checkpoint is removed, and tensors outside of it are left out; each tied tensor gets the name that the
    reference has for it. A directory keeps its names.
    """
    names, prefix = _candidates(source, keyed(source.names, source.label)), ""
    wanted = keyed(reference.names, reference.label)
    if source.directory is None:
        own_prefix, missing = differing_prefixes(names, wanted, source.label)
        # Where the reference has a prefix too, tensors outside of the prefix may be part of the model.
        prefix = "" if missing else own_prefix
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
    """Return stored names by key; a tied tensor in memory is listed under each of its names."""
    candidates, stored = dict(names), set(side.names)
    for key, alias in keyed(side.tied, side.label).items():
        if side.tied[alias] in stored:
            candidates.setdefault(key, side.tied[alias])
    return candidates


def measured_names(
    pairing: Pairing, modules: Sequence[nn.Module], config: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of the tensors that a vector has of two paired sources, weights and buffers; and the names of the buffers among them.

    Args:
        pairing: The start and the tuned model under one set of names.
        modules: Those of the two that are modules in memory.
        config: Config of the model; None where it is not known.

    Raises:
        LayoutMismatchError: Integers whose role is not known differ.
    """
    start, tuned = pairing.start, pairing.tuned
    roles: dict[str, Role] = {}
    for side in (start, tuned):
        stored = {name: side.origin_name(name) for name in side.names}
        role_of = roles_of([(stored[name], side.shape(name), side.dtype(name)) for name in side.names], modules, config)
        # A buffer on either side is no weight.
        roles |= {name: role_of[stored[name]] for name in side.names if roles.get(name, "weight") == "weight"}
    for name, role in roles.items():
        if role == "integers" and not torch.equal(start.read(name), tuned.read(name)):
            raise LayoutMismatchError(f"{name} holds integers, which must be equal in {start.label} and {tuned.label}")
    floating = tuple(name for name, role in roles.items() if role in ("weight", "state") and start.dtype(name).is_floating_point)
    return floating, frozenset(name for name in floating if roles[name] == "state")


def brought_to(vector: TensorSource, other: TensorSource, leave_out: LeaveOut = NOTHING) -> View:
    """Return the tensors of another vector under the names of a vector.

    Args:
        vector: The vector whose names are used.
        other: The vector to rename; it may have tensors that were left out of ``vector``.
        leave_out: Tensors that need not be in both.

    Raises:
        LayoutMismatchError: A tensor is on one side only, or has two shapes.
    """
    try:
        pairing = match(vector, other, leave_out)
        check_same_shapes(pairing.start, pairing.tuned)
    except LayoutMismatchError:
        # The advice for vectors differs from that for models.
        check_same_tensors(vector, other)
        raise
    return View(pairing.tuned, {pairing.start.origin_name(name): name for name in pairing.start.names})
