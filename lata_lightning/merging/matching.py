"""Onto and vectors under one set of names, and with which factor each vector acts on each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lata_lightning.errors import BaseMismatchError, LataError
from lata_lightning.layers import LayerMap, LayerPosition
from lata_lightning.merging.term import Term
from lata_lightning.numerics.combine import Summand
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.mismatches import check_same_shapes
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.pairing import Pairing, match
from lata_lightning.store.roles import is_variance
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Forwarding, View, Zeros


@final
class Padded(Forwarding):
    """A vector with zeros for the tensors that it does not hold.

    Args:
        source: The vector, under the names of ``onto``.
        onto: Whose tensors to have.
    """

    def __init__(self, source: TensorSource, onto: TensorSource) -> None:
        super().__init__(source.origin, parallel=source.parallel)
        self._source, self._zeros, self._held = source, Zeros(onto), frozenset(source.names)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._zeros.names

    @override
    def target(self, name: str) -> tuple[TensorSource, str]:
        return (self._source if name in self._held else self._zeros), name

    def holds(self, name: str) -> bool:
        """Return whether the vector itself has the tensor."""
        return name in self._held


@dataclass(frozen=True)
class Matched:
    """Weights and vectors under one set of names.

    Attributes:
        onto: All floating tensors of the model, those that are stored twice once.
        readers: The vectors, each with zeros where it holds nothing.
        terms: The vectors and their scales, in the same order.
        shares: Factor of each vector by buffer: one vector that changed it gives its own, several their mean.
    """

    onto: TensorSource
    readers: Sequence[Padded]
    terms: Sequence[Term]
    shares: Mapping[str, tuple[float, ...]]

    def factors(self, name: str) -> tuple[float, ...]:
        """The factor of each vector on a tensor of ``onto``; 0 where it does not act."""
        if name in self.shares:
            return self.shares[name]
        sides = zip(self.terms, self.readers, strict=True)
        return tuple(term.factor(reader.origin_name(name)) if reader.holds(name) else 0.0 for term, reader in sides)

    @property
    def unchanged(self) -> list[frozenset[str]]:
        """For each vector the tensors of ``onto`` that are known to be zero in it, or that it does not hold."""
        sides = zip(self.terms, self.readers, strict=True)
        return [
            frozenset(name for name in reader.names if not reader.holds(name) or reader.origin_name(name) in term.vector.unchanged)
            for term, reader in sides
        ]

    @property
    def layers(self) -> LayerMap:
        """LayerPosition of every tensor of ``onto``, as the first vector that holds it says."""
        places = {name: LayerPosition(None, "other") for name in self.onto.names}
        for term, reader in reversed(list(zip(self.terms, self.readers, strict=True))):
            places |= {name: term.vector.layers.positions[reader.origin_name(name)] for name in reader.names if reader.holds(name)}
        return LayerMap(places, self.terms[0].vector.layers.blocks)

    def check_start(self, hashes: Mapping[str, str], label: str) -> None:
        """Refuse vectors that record another start than this model.

        Args:
            hashes: Hashes of the tensors of ``onto``.
            label: Of the model.

        Raises:
            BaseMismatchError: The hash that a vector records of its start is another.
        """
        for term, reader in zip(self.terms, self.readers, strict=True):
            origin = term.vector.manifest.start_identity
            held = {reader.origin_name(name): hashes[name] for name in reader.names if reader.holds(name)}
            # What was stored fused has no hash of its own.
            if origin.content_hash is None or held.keys() != set(term.vector):
                continue
            found = content_hash(held)
            if origin.content_hash != found:
                raise BaseMismatchError(
                    f"{term.vector.label} started from {origin.location} with the content hash {origin.content_hash}, and {label} has {found}: these are "
                    "different weights. Name the start model (onto=…, --onto), or switch the check off (check_base=False, --check-base false)."
                )


def match_terms(source: TensorSource, terms: Sequence[Term], leave_out: LeaveOut = NOTHING, *, same_shapes: bool = True) -> Matched:
    """Bring a model and vectors under one set of names: those of the model, or, where it stores fused what a vector has in pieces, the pieces.

    Args:
        source: The model.
        terms: The vectors. A vector may lack what was left out of it; then nothing is added there.
        leave_out: What of the vectors is left out beside.
        same_shapes: Whether to refuse tensors of two shapes.

    Raises:
        LayoutMismatchError: A vector does not fit the model.
        LataError: Buffers of the vectors cannot be taken over.
    """
    weights: TensorSource = View(source, {name: name for name in source.names if source.dtype(name).is_floating_point})
    for term in terms:
        weights = _completed(weights, _found(weights, term, leave_out, same_shapes))
    # A later vector may have asked for other pieces of the model than those before it.
    readers = [Padded(_found(weights, term, leave_out, same_shapes).tuned, weights) for term in terms]
    shares: dict[str, tuple[float, ...]] = {}
    buffers = [
        {name for name in reader.names if reader.holds(name) and reader.origin_name(name) in term.vector.layers.statistics}
        for reader, term in zip(readers, terms, strict=True)
    ]
    for name in weights.names:
        if any(name in held for held in buffers):
            shares[name] = _shares(name, weights, readers, terms, buffers)
    return Matched(weights, readers, terms, shares)


def _found(weights: TensorSource, term: Term, leave_out: LeaveOut, same_shapes: bool) -> Pairing:
    given = LeaveOut((*term.vector.manifest.leave_out, *leave_out.patterns), leave_out.names)
    found = match(weights, term.vector.tensors, given)
    if same_shapes:
        check_same_shapes(found.start, found.tuned)
    return found


def _completed(weights: TensorSource, found: Pairing) -> TensorSource:
    """What is paired of the weights, and the rest of them under their own names; without second copies of tied tensors."""
    paired = {name: found.start.stored_name(name) for name in found.start.names}
    if found.start.source is weights:
        shown = {stored: name for name, stored in paired.items()}
        return View(weights, {shown.get(name, name): name for name in weights.names if name not in found.copies})
    return View(found.start.source, {name: name for name in found.start.source.names if name not in found.copies})


def _shares(
    name: str, weights: TensorSource, readers: Sequence[Padded], terms: Sequence[Term], buffers: Sequence[set[str]]
) -> tuple[float, ...]:
    """With which factor each vector acts on a buffer: what changed it is taken over, of several the mean."""
    acting = [
        name in held and term.factor(reader.origin_name(name)) > 0 and bool(reader.read(name).any())
        for reader, term, held in zip(readers, terms, buffers, strict=True)
    ]
    shares = tuple(float(acts) / max(sum(acting), 1) for acts in acting)
    if is_variance(name) and any(acting):
        merged = weights.read(name).double() + sum(
            share * reader.read(name).double() for share, reader in zip(shares, readers, strict=True)
        )
        if bool((merged < 0).any()):
            raise LataError(
                f"running variances must not become negative, as {name} would: the statistics of {weights.label} are not those that the vectors started "
                f"from. Leave them out (--leave-out 'running_(mean|var)$', leave_out=…) and take them anew on data."
            )
    return shares


def summand(onto: TensorSource, reader: TensorSource, name: str, factor: float) -> Summand:
    """One summand of a tensor, computed from two models without reading anything twice."""
    sides = reader.sides(name)
    if sides is None:
        return Summand(factor, reader.chunks(name))
    tuned, start, held = sides
    if start.byte_range(held) is not None and start.byte_range(held) == onto.byte_range(name):
        return Summand(factor, tuned.chunks(held), from_onto=True)
    return Summand(factor, tuned.chunks(held), start.chunks(held))
