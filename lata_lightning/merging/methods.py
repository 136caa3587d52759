"""The methods of a merge: adding several vectors, or making one vector of them first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from lata_lightning.errors import LataError
from lata_lightning.linearity.from_vectors import check_mergeable, matrix_derivation, solving_device
from lata_lightning.linearity.matrix_merges import MatrixMerge
from lata_lightning.linearity.methods import METHODS, MatrixMethod, Method
from lata_lightning.merging.matching import Matched
from lata_lightning.numerics.matrix_regression import Settings
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.provenance import Derivation, LayerValues


class OneVector:
    """One vector made of several, under the names and with the rows of the model it is added to.

    Args:
        matched: The vectors, under the names of the model they are added to; all with the same scale.
        readers: Their tensors, with the rows of the model.
        method: ``regression``, ``tsv`` or ``iso``.
        device: Device to solve matrices on.

    Attributes:
        merged: The tensors of the one vector.

    Raises:
        LataError: The vectors cannot be made into one, have coefficients, or have different scales; or the device does not exist.
    """

    def __init__(self, matched: Matched, readers: Sequence[TensorSource], method: MatrixMethod, device: str = "cpu") -> None:
        vectors, scales = [term.vector for term in matched.terms], {term.scale for term in matched.terms}
        check_mergeable(vectors)
        weighted = [vector.label for vector in vectors if vector.manifest.coefficients is not None]
        if weighted:
            raise LataError(
                f"the method {method!r} takes vectors whole, and {weighted[0]} has coefficients. Take them off (unweighted(), --weighting none), or use "
                "the method 'sum'."
            )
        if len(scales) > 1:
            given = ", ".join(f"{term.scale:g}" for term in matched.terms)
            raise LataError(f"the method {method!r} makes one vector of all, which has one scale: got {given}")
        settings = Settings(device=solving_device(device))
        unchanged, (self._scale,) = matched.unchanged, scales
        self._frozen = frozenset.intersection(*unchanged)
        self.merged = MatrixMerge(readers, [vector.label for vector in vectors], unchanged, matched.layers, method, settings)
        self._derivation = matrix_derivation(self.merged, vectors, method, settings)

    def factor(self, name: str) -> float:
        """Return the multiplier of a tensor of the one vector; 0 where it is known to be zero."""
        return 0.0 if name in self._frozen else self._scale

    def record(self) -> dict[str, Any]:
        """Return the derivation of the vector, with the measurements taken while it was read."""
        measured = tuple(LayerValues(name, layers, vector) for (name, vector), layers in self.merged.measured().items())
        derivation: Derivation = replace(self._derivation, measured=measured)
        return asdict(derivation)


def check_method(method: str, device: str) -> Method:
    """Return the method itself.

    Raises:
        LataError: The method is unknown, or a device is given for a method that solves no matrices.
    """
    if method not in METHODS:
        raise LataError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "sum" and device != "cpu":
        raise LataError("the method 'sum' adds on the CPU, so there is no device to choose")
    return method
