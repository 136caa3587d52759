"""Exporting the pure vector, with its coefficients multiplied in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lata_lightning.errors import LataError
from lata_lightning.merging.merge import Term
from lata_lightning.store.writer import Progress


def export_pure(terms: Sequence[Term], output: str | Path, *, dtype: str = "float32", progress: Progress | None = None) -> Path:
    """Write the pure vector of one term; the loss of a precision below float32 is measured and recorded in its manifest.

    Raises:
        LataError: There are several terms, or the vector has no coefficients or started from base.
        OutputError, CorruptFileError: As for ``TaskVector.save``.
    """
    if len(terms) != 1:
        raise LataError(f"a pure vector is made of one vector, got {len(terms)}: export them one by one")
    terms[0].vector.pure().save(output, dtype=dtype, progress=progress)
    return Path(output)
