"""Merging several task vectors into one, from the vectors alone: without samples, and without a scale to choose."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from lata_lightning.errors import LataError
from lata_lightning.layers import LayerMap
from lata_lightning.linearity.matrix_merges import NAMES, MatrixMerge
from lata_lightning.linearity.methods import MATRIX_METHODS, MatrixMethod
from lata_lightning.numerics.matrix_regression import Settings
from lata_lightning.store.meaning import check_all_mean_the_same
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import View
from lata_lightning.vectors.aligning import check_same_model, check_same_start
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import Manifest
from lata_lightning.vectors.matched import MatchedVectors, match_vectors
from lata_lightning.vectors.provenance import Derivation, Identity, Input
from lata_lightning.vectors.task_vector import TaskVector


def merge_matrices(
    vectors: Sequence[TaskVector],
    method: MatrixMethod = "regression",
    *,
    start: TensorSource | None = None,
    settings: Settings | None = None,
    check_base: bool = True,
) -> TaskVector:
    """Merge several task vectors into one, whose tensors are computed when they are read.

    Args:
        vectors: Task vectors of one start; their coefficients are ignored.
        method: As for ``MatrixMerge``.
        start: The model that they started from, whose names the result gets; by default those of the vector with the most tensors. It is needed if each of
            two vectors has tensors that were left out of the other.
        settings: How the regression solves matrices.
        check_base: Refuse vectors that are known to start from different weights.

    Returns:
        A vector relative to the same start, to be added at scale 1. When it is saved, its manifest gets the measurements.

    Raises:
        LataError: There is no vector, one is an instruction vector, some started from instruct and some from base, or the method is unknown.
        LayoutMismatchError: The vectors have different tensors, or their models have other tokens or compute another function.
        BaseMismatchError: Two vectors start from different weights.
    """
    if method not in MATRIX_METHODS:
        raise LataError(f"unknown method {method!r}; choose one of {', '.join(MATRIX_METHODS)}")
    check_mergeable(vectors)
    if check_base:
        check_same_start(vectors)
    settings = settings or Settings()
    # One vector may have tensors that were left out of another.
    source = max((vector.tensors for vector in vectors), key=lambda tensors: len(tensors.names)) if start is None else start
    matched = match_vectors(source, vectors)
    check_all_mean_the_same([(vector.label, vector.manifest.meaning) for vector in vectors])
    if start is not None:
        # Vectors between different vocabularies have the rows of the start already.
        check_same_model(start, vectors, by_token=False)
    readers = [View(reader, {name: name for name in matched.covered}) for reader in matched.readers]
    merged = MatrixMerge(readers, [vector.label for vector in vectors], matched.unchanged, matched.layers, method, settings)
    return made_of(matched, merged, matrix_derivation(merged, vectors, method, settings))


def made_of(matched: MatchedVectors, tensors: TensorSource, derivation: Derivation, start: Identity | None = None) -> TaskVector:
    """Return a vector derived from several, with a manifest that follows from theirs.

    Args:
        matched: The vectors, and the model whose names the new vector has.
        tensors: Tensors of the new vector: all tensors that any vector has.
        derivation: How it was derived.
        start: Identity of the start, if the vectors do not record it.
    """
    frozen, layers, names = frozenset.intersection(*matched.unchanged), matched.layers, set(tensors.names)
    first = matched.vectors[0].manifest
    manifest = Manifest(
        kind="task",
        start=first.start,
        layers=LayerMap({name: layers.positions[name] for name in tensors.names}, layers.blocks),
        start_identity=_start_of(matched.vectors, names, start or Identity()),
        meaning=first.meaning,
        tied=first.tied if all(any(name in names for name in group) for group in first.tied) else (),
        tensors={name: TensorEntry(tensors.shape(name), "float32", unchanged=True) for name in tensors.names if name in frozen},
        derivation=derivation,
        leave_out=matched.leave_out(),
    )
    return TaskVector(tensors, manifest)


def _start_of(vectors: Sequence[TaskVector], names: Collection[str], unknown: Identity) -> Identity:
    """Return the identity of the start for a vector with these tensors."""
    known = [vector for vector in vectors if vector.manifest.start_identity != Identity()]
    if not known:
        return unknown
    # The hash covers the names, so it is not valid for another set of tensors.
    same = [vector.manifest.start_identity for vector in known if set(vector) == set(names)]
    return same[0] if same else replace(known[0].manifest.start_identity, content_hash=None)


def check_mergeable(vectors: Sequence[TaskVector]) -> None:
    """Refuse vectors that cannot be merged into one.

    Raises:
        LataError: There is no vector, one is an instruction vector, or some started from instruct and some from base.
    """
    if not vectors:
        raise LataError("there is nothing to merge: give at least one vector")
    wrong = [vector.label for vector in vectors if vector.manifest.kind != "task"]
    if wrong:
        raise LataError(f"only task vectors are made into one; {wrong[0]} is an instruction vector. Leave it out.")
    starts = {vector.start: vector.label for vector in vectors}
    if len(starts) > 1:
        raise LataError(
            f"vectors that are made into one must count from one start: {starts['instruct']} started from instruct, {starts['base']} from base. Take the "
            "instruction vector off those from base (without(instruction_vector)), or extract all of them from one model."
        )


def matrix_derivation(merged: MatrixMerge, vectors: Sequence[TaskVector], method: MatrixMethod, settings: Settings) -> Derivation:
    """Return the derivation of a merge, without the measurements that are taken while it is read."""
    averaged = tuple(name for name in merged.names if len(merged.shape(name)) > 1 and name not in merged.forms)
    return Derivation(
        NAMES[method],
        {"ridge": settings.ridge, "prior": settings.prior} if method == "regression" else {},
        tuple(Input(vector.label, vector.manifest.tuned_identity) for vector in vectors),
        averaged,
    )


def solving_device(name: str) -> torch.device:
    """Return a torch device by name.

    Raises:
        LataError: The device does not exist here, or cannot compute in float64.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).sum().item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise LataError(
            f"matrices cannot be solved on {name!r} here ({str(error).partition(chr(10))[0]}). Leave the device out, or name another."
        ) from error
    return device
