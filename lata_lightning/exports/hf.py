"""Exporting a complete model directory for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lata_lightning.merging.merge import Term, merge
from lata_lightning.merging.sum import Onto, start_of
from lata_lightning.store.writer import Progress


def export_hf(
    terms: Sequence[Term],
    output: str | Path,
    *,
    onto: Onto | None = None,
    dtype: str | None = None,
    check_base: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write start + Σ scale · coefficient · vector as a model directory: the merge onto the start model.

    Args:
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet.
        onto: The start model, if it is not at the location that the first vector records.
        dtype: Dtype of all tensors; by default each keeps that of the start.
        check_base: Refuse a start model that is known to differ from the one that a vector started from.
        command: The command that makes the output, recorded in its card.
        progress: Called after each tensor.

    Raises:
        BaseMismatchError: A vector started from another model.
        LataError: The location of the start is not known, or as for ``merge``.
    """
    return merge(
        start_of(terms, onto),
        terms,
        output,
        dtype=dtype,
        check_base=check_base,
        check_start=check_base,
        command=command,
        progress=progress,
    )
