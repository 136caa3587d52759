"""The start model of vectors, and start + weighted sum of the vectors, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError, SourceError
from lata_lightning.merging.matching import match_terms, summand
from lata_lightning.merging.term import Term
from lata_lightning.numerics.combine import combine, combined
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.directories import find_weights
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import named_like
from lata_lightning.store.sources import StateDictSource, TensorSource
from lata_lightning.store.views import Fingerprinted
from lata_lightning.vectors.aligning import check_same_model, check_same_start

Onto = str | Path | nn.Module | Mapping[str, Tensor] | TensorSource


def start_of(terms: Sequence[Term], onto: Onto | None) -> Onto:
    """Return the given start model, or the location of the start that the first vector records.

    Raises:
        LataError: No start is given, and none is recorded because it was in memory.
        SourceError: There is nothing at the recorded location, for example because it is relative to another directory.
    """
    if onto is not None:
        return onto
    location = terms[0].vector.manifest.start_identity.location
    if location is None:
        raise LataError(f"{terms[0].vector.label} does not record where its start model lies: name it (onto=…, --onto MODEL)")
    try:
        find_weights(location)
    except SourceError as error:
        raise SourceError(
            f"{terms[0].vector.label} records its start model as {location}, which is not there, seen from {Path.cwd()}: name it (onto=…, --onto MODEL)"
        ) from error
    return location


class Sum:
    """Start + Σ scale · coefficient · vector, under the names of the start; tensors are read when they are needed.

    Attributes:
        source: The start model, with its config.
        weights: The floating tensors of the start model.

    Raises:
        BaseMismatchError: Two vectors started from different weights.
        LayoutMismatchError: The tensors of a vector are not those of the start, or its model has other tokens or computes another function.
    """

    def __init__(self, terms: Sequence[Term], onto: Onto | None, *, check_base: bool = True) -> None:
        if check_base:
            check_same_start([term.vector for term in terms])
        self._terms = terms
        opened = open_source(start_of(terms, onto))
        if isinstance(onto, nn.Module) and opened.config is not None and not opened.config.get("architectures"):
            # transformers writes the class into the config only when a model is saved.
            opened = StateDictSource(onto, replace(opened.origin, config={**opened.config, "architectures": [type(onto).__name__]}))
        self.source = named_like(opened, terms[0].vector.tensors)
        self._matched = match_terms(self.source, terms)
        check_same_model(self.source, [term.vector for term in terms])
        self.weights = Fingerprinted(self._matched.onto)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the floating tensors."""
        return self.weights.names

    def differences(self, name: str) -> list[tuple[Tensor | LowRank, float]]:
        """Return the differences that are added to a tensor, dense or as factors, each with its multiplier; zero ones are left out."""
        acting = zip(self._matched.readers, self.factors(name), strict=True)
        differences = [(reader.low_rank(name) or reader.read(name), factor) for reader, factor in acting if factor != 0]
        return [(difference, factor) for difference, factor in differences if bool(difference.any())]

    def factors(self, name: str) -> tuple[float, ...]:
        """Return the multiplier of each vector for a tensor; 0 where it is not added."""
        return self._matched.factors(name)

    def low_rank(self, name: str) -> list[LowRank]:
        """Return those differences added to a tensor that are stored as factors, without reading the others."""
        sides = zip(self._matched.readers, self.factors(name), strict=True)
        differences = (reader.low_rank(name) for reader, factor in sides if factor != 0)
        return [difference for difference in differences if difference is not None]

    def merged(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Return the sum of a tensor, rounded once to the dtype (by default that of the start), bit for bit as a merge writes it."""
        start = self.weights.read(name)
        return combine(start, self.differences(name), dtype or start.dtype)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield the sum of a tensor chunk by chunk, rounded once to the dtype of the start; each is valid until the next is asked for."""
        acting = zip(self._matched.readers, self.factors(name), strict=True)
        summands = [summand(self.weights, reader, name, factor) for reader, factor in acting if factor != 0]
        return combined(prod(self.weights.shape(name)), self.weights.chunks(name), summands, self.weights.dtype(name))

    def check_start(self) -> None:
        """Compare the start with the hashes that the vectors record, reading those of its tensors that have not been read yet.

        Raises:
            BaseMismatchError: A vector started from another model.
        """
        if any(term.vector.manifest.start_identity.content_hash for term in self._terms):
            for name in self.names:
                if name not in self.weights.hashes:
                    self.weights.read(name)
            self._matched.check_start(self.weights.hashes, self.source.label)
