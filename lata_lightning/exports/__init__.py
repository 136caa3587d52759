"""Exporting vectors: as a pure vector, a model directory, a peft adapter, mergekit's input, or a table of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lata_lightning.errors import LataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lata_lightning.merging.merge import Term
    from lata_lightning.store.sources import TensorSource
    from lata_lightning.store.writer import Progress

Export = Literal["pure", "hf", "peft", "mergekit", "coefficients"]
EXPORTS: tuple[Export, ...] = get_args(Export)


def export_to(
    kind: str,
    terms: Sequence[Term],
    output: str | Path,
    *,
    onto: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    check_base: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Write vectors in a form that another tool reads.

    Args:
        kind: ``"pure"``, ``"hf"``, ``"peft"``, ``"mergekit"`` or ``"coefficients"``; see the function of each for its output.
        terms: The vectors, each with its scale; stored coefficients weight the layers.
        output: A directory that does not exist yet; written atomically.
        onto: The start model, if it is not at the location that the first vector records.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the default depends on the kind.
        rank: For ``"peft"``: number of singular values to keep of each dense matrix; 16 if no energy is given either.
        energy: For ``"peft"``: share of ‖τ‖² to keep of each dense matrix, in (0, 1].
        check_base: Refuse a start model that is known to differ from the one that the vectors started from.
        command: The command that makes the output, recorded in its card.
        progress: Called after each tensor with the bytes written so far and the bytes in all.
        note: For ``"peft"``: called with a sentence if the adapter is large compared with the model, or loses much of the vectors.

    Returns:
        The output directory. Nothing else changes.

    Raises:
        LataError: The kind is unknown, or does not use an option that is given; or as the function of the kind raises.
    """
    if kind not in EXPORTS:
        raise LataError(f"unknown export {kind!r}; choose one of {', '.join(EXPORTS)}")
    if not terms:
        raise LataError("there is nothing to export: give at least one vector")
    if kind != "peft" and not (rank is None and energy is None):
        raise LataError(f"a rank or an energy is for the export to peft, not for {kind!r}")
    if kind in ("pure", "coefficients"):
        scaled = [term for term in terms if term.scale != 1]
        if scaled or onto is not None:
            what = f"a scale ({scaled[0].scale:g} of {scaled[0].vector.label})" if scaled else "a start model"
            raise LataError(f"the export {kind!r} has no place for {what}: give it where the vector is merged")
    # Imported here, as each kind needs other libraries.
    if kind == "pure":
        from lata_lightning.exports.pure import export_pure

        return export_pure(terms, output, dtype=dtype or "float32", progress=progress)
    if kind == "coefficients":
        from lata_lightning.exports.coefficients import export_coefficients

        if dtype is not None:
            raise LataError("the export 'coefficients' writes no tensors: leave the dtype away")
        return export_coefficients([term.vector for term in terms], output)
    if kind == "hf":
        from lata_lightning.exports.hf import export_hf

        return export_hf(terms, output, onto=onto, dtype=dtype, check_base=check_base, command=command, progress=progress)
    if kind == "mergekit":
        from lata_lightning.exports.mergekit import export_mergekit

        return export_mergekit(terms, output, onto=onto, dtype=dtype or "float32", check_base=check_base, progress=progress)
    from lata_lightning.exports.peft import export_peft

    return export_peft(
        terms,
        output,
        onto=onto,
        dtype=dtype,
        rank=rank,
        energy=energy,
        check_base=check_base,
        command=command,
        progress=progress,
        note=note,
    )
