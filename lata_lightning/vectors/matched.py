"""A model and task vectors under one set of names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lata_lightning.errors import BaseMismatchError
from lata_lightning.layers import LayerMap, LayerPosition
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.mismatches import check_same_shapes
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.pairing import Pairing, match
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Forwarding, View, Zeros
from lata_lightning.vectors.task_vector import TaskVector


@final
class Padded(Forwarding):
    """A vector with zeros for the tensors that it does not hold.

    Args:
        source: The vector, under the names of ``onto``.
        onto: The model whose tensors the result has.
    """

    def __init__(self, source: TensorSource, onto: TensorSource) -> None:
        super().__init__(source.origin, parallel=source.parallel)
        self._source, self._zeros, self._own = source, Zeros(onto), frozenset(source.names)

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._zeros.names

    @override
    def target(self, name: str) -> tuple[TensorSource, str]:
        return (self._source if name in self._own else self._zeros), name

    def holds(self, name: str) -> bool:
        """Return whether the vector itself has the tensor."""
        return name in self._own


@dataclass(frozen=True)
class MatchedVectors:
    """Weights and vectors under one set of names.

    Attributes:
        onto: All floating tensors of the model, those that are stored twice once.
        readers: The vectors, each with zeros where it holds nothing.
        vectors: The vectors themselves, in the same order.
    """

    onto: TensorSource
    readers: Sequence[Padded]
    vectors: Sequence[TaskVector]

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the tensors of ``onto`` that at least one vector holds."""
        return tuple(name for name in self.onto.names if any(reader.holds(name) for reader in self.readers))

    @property
    def unchanged(self) -> list[frozenset[str]]:
        """For each vector the tensors of ``onto`` that are known to be zero in it, or that it does not hold."""
        sides = zip(self.vectors, self.readers, strict=True)
        return [
            frozenset(name for name in reader.names if not reader.holds(name) or reader.origin_name(name) in vector.unchanged)
            for vector, reader in sides
        ]

    @property
    def layers(self) -> LayerMap:
        """Position of every tensor of ``onto``: what the first vector that holds it says, with blocks named as in the first vector."""
        positions: dict[str, LayerPosition] = {}
        for vector, reader in zip(self.vectors, self.readers, strict=True):
            own = {name: vector.layers.positions[reader.origin_name(name)] for name in reader.names if reader.holds(name)}
            names = {own[name].block: positions[name].block for name in own if name in positions}
            positions = {
                name: LayerPosition(names.get(position.block, position.block), position.part) for name, position in own.items()
            } | positions
        return LayerMap(
            {name: positions.get(name, LayerPosition(None, "other")) for name in self.onto.names}, self.vectors[0].layers.blocks
        )

    def leave_out(self) -> tuple[str, ...]:
        """Return patterns for what all vectors were made without, for the manifest of a vector made of them."""
        covered = self.covered
        beside = [name for name in self.onto.names if name not in set(covered)]
        patterns: dict[str, None] = {}
        for vector in self.vectors:
            for pattern in vector.manifest.leave_out:
                if not any(re.search(pattern, name) for name in covered):
                    patterns[pattern] = None
                    continue
                # Another vector has some of what this one was made without.
                patterns |= {f"^{re.escape(name)}$": None for name in beside if re.search(pattern, name)}
        return tuple(patterns)

    def check_start(self, hashes: Mapping[str, str], label: str) -> None:
        """Refuse vectors that record another start than this model.

        Args:
            hashes: Hashes of the tensors of ``onto``.
            label: Name of the model, for messages.

        Raises:
            BaseMismatchError: The hash that a vector records of its start is another.
        """
        for vector, reader in zip(self.vectors, self.readers, strict=True):
            origin = vector.manifest.start_identity
            own = {reader.origin_name(name): hashes[name] for name in reader.names if reader.holds(name)}
            # What was stored fused has no hash of its own.
            if origin.content_hash is None or own.keys() != set(vector):
                continue
            actual = content_hash(own)
            if origin.content_hash != actual:
                raise BaseMismatchError(
                    f"{vector.label} started from {origin.location} with the content hash {origin.content_hash}, and {label} has {actual}: these are "
                    "different weights. Name the start model (onto=…, --onto), or switch the check off (check_base=False, --check-base false)."
                )


def match_vectors(
    source: TensorSource, vectors: Sequence[TaskVector], leave_out: LeaveOut = NOTHING, *, same_shapes: bool = True
) -> MatchedVectors:
    """Bring a model and vectors under one set of names.

    These are the names of the model. Where it stores fused what a vector has as several tensors, they are the names of those tensors.

    Args:
        source: The model.
        vectors: A vector may lack what was left out of it; it is zero there.
        leave_out: What to leave out of the vectors, beside what they were made without.
        same_shapes: Whether to refuse tensors of two shapes.

    Raises:
        LayoutMismatchError: A vector does not fit the model.
    """
    weights: TensorSource = View(source, {name: name for name in source.names if source.dtype(name).is_floating_point})
    for vector in vectors:
        weights = _completed(weights, _paired(weights, vector, leave_out, same_shapes))
    # A later vector may split fused tensors of the model that those before it did not.
    readers = [Padded(_paired(weights, vector, leave_out, same_shapes).tuned, weights) for vector in vectors]
    return MatchedVectors(weights, readers, vectors)


def _paired(weights: TensorSource, vector: TaskVector, leave_out: LeaveOut, same_shapes: bool) -> Pairing:
    given = LeaveOut((*vector.manifest.leave_out, *leave_out.patterns), leave_out.names)
    pairing = match(weights, vector.tensors, given)
    if same_shapes:
        check_same_shapes(pairing.start, pairing.tuned)
    return pairing


def _completed(weights: TensorSource, pairing: Pairing) -> TensorSource:
    """Return the weights: what is paired under its paired name, the rest under their own; without second copies of tied tensors."""
    paired = {name: pairing.start.stored_name(name) for name in pairing.start.names}
    if pairing.start.source is weights:
        shown = {stored: name for name, stored in paired.items()}
        return View(weights, {shown.get(name, name): name for name in weights.names if name not in pairing.copies})
    return View(pairing.start.source, {name: name for name in pairing.start.source.names if name not in pairing.copies})
