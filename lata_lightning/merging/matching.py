"""Onto and vectors under one set of names, and with which factor each vector acts on each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lata_lightning.errors import LataError
from lata_lightning.merging.term import Term
from lata_lightning.numerics.combine import Summand
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.roles import is_variance
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.matched import MatchedVectors, Padded, match_vectors


@dataclass(frozen=True)
class Matched(MatchedVectors):
    """Weights and the vectors that are added to them, under one set of names.

    Attributes:
        terms: The vectors and their scales, in the same order.
        shares: Factor of each vector by buffer: one vector that changed it gives its own, several their mean.
    """

    terms: Sequence[Term]
    shares: Mapping[str, tuple[float, ...]]

    def factors(self, name: str) -> tuple[float, ...]:
        """The factor of each vector on a tensor of ``onto``; 0 where it does not act."""
        if name in self.shares:
            return self.shares[name]
        sides = zip(self.terms, self.readers, strict=True)
        return tuple(term.factor(reader.origin_name(name)) if reader.holds(name) else 0.0 for term, reader in sides)


def match_terms(source: TensorSource, terms: Sequence[Term], leave_out: LeaveOut = NOTHING, *, same_shapes: bool = True) -> Matched:
    """Bring a model and the vectors to add to it under one set of names, as ``match_vectors``, and share out the buffers that they change.

    Args:
        source: The model.
        terms: The vectors. A vector may lack what was left out of it; then nothing is added there.
        leave_out: What to leave out of the vectors, beside what they were made without.
        same_shapes: Whether to refuse tensors of two shapes.

    Raises:
        LayoutMismatchError: A vector does not fit the model.
        LataError: Buffers of the vectors cannot be taken over.
    """
    matched = match_vectors(source, [term.vector for term in terms], leave_out, same_shapes=same_shapes)
    weights, readers = matched.onto, matched.readers
    shares: dict[str, tuple[float, ...]] = {}
    buffers = [
        {name for name in reader.names if reader.holds(name) and reader.origin_name(name) in term.vector.layers.statistics}
        for reader, term in zip(readers, terms, strict=True)
    ]
    for name in weights.names:
        if any(name in own for own in buffers):
            shares[name] = _shares(name, weights, readers, terms, buffers)
    return Matched(weights, readers, matched.vectors, terms, shares)


def _shares(
    name: str, weights: TensorSource, readers: Sequence[Padded], terms: Sequence[Term], buffers: Sequence[set[str]]
) -> tuple[float, ...]:
    """With which factor each vector acts on a buffer: what changed it is taken over, of several the mean."""
    acting = [
        name in own and term.factor(reader.origin_name(name)) > 0 and bool(reader.read(name).any())
        for reader, term, own in zip(readers, terms, buffers, strict=True)
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
    tuned, start, side_name = sides
    if start.byte_range(side_name) is not None and start.byte_range(side_name) == onto.byte_range(name):
        return Summand(factor, tuned.chunks(side_name), from_onto=True)
    return Summand(factor, tuned.chunks(side_name), start.chunks(side_name))
