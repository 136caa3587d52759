"""Weighting: the only code that turns the alignment of a vector into its coefficients.

Nothing is weighted silently. Coefficients that come from alignments are applied if the alignments spread enough to rank layers by, or if the caller asks
for them; otherwise an error names both alternatives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lata_lightning.alignment import FLAT_SPREAD, Alignment
from lata_lightning.errors import WeightingError, first_three
from lata_lightning.layers import Level
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, STORED, WEIGHTINGS, Rule, Weighting, follows_alignment


def weigh(
    vector: TaskVector,
    rule: Weighting | Literal["stored"] | Rule | None = None,
    instruction: TaskVector | None = None,
    *,
    default: Weighting = "linear",
    alignment: Alignment | None = None,
    level: Level | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    outside: float = 0.0,
    check_base: bool = True,
) -> TaskVector:
    """Return a vector with the coefficients of a rule.

    Args:
        vector: A task vector; one that started from base is not converted (see ``from_instruct``).
        rule: ``"linear"``, ``"log"``, ``"threshold"``, a function from the alignment to the coefficient by layer, ``"none"`` for plain task arithmetic, or
            ``"stored"`` for the coefficients that the vector stores. With None, the rule is ``default`` if there is an instruction vector or an
            alignment; else the stored coefficients are used, and refused if the alignments behind them are too flat to rank by.
        instruction: Instruction vector to measure the alignment with; by default the alignment that the vector stores is used.
        default: The rule if ``rule`` is None.
        alignment: The alignment, if it has been measured with the instruction vector already.
        level: Unit of weighting; by default that of the stored alignment, and blocks if the alignment is measured here.
        threshold: Used by the rule ``"threshold"``.
        outside: Coefficient of the tensors outside all layers; 1 with ``"none"``.
        check_base: Refuse an instruction vector that is known to belong to other weights.

    Returns:
        A vector with the same tensors, which records the rule by name.

    Raises:
        WeightingError: The rule is unknown or cannot be applied; no coefficients are stored; or no rule is given and the alignments are too flat.
        BaseMismatchError, LayoutMismatchError: The instruction vector does not belong to the vector.
    """
    measures = instruction is not None or alignment is not None
    if rule == "stored" or (rule is None and not measures):
        if rule == "stored" and vector.manifest.coefficients is None:
            raise WeightingError(f"{vector.label} stores no coefficients to apply: ask for a rule, or for 'none'")
        if rule is None:
            check_asked_for(vector)
        return TaskVector(vector.tensors, replace(vector.manifest, asked_for=vector.manifest.asked_for or rule is not None))
    if rule == "none" and alignment is None:
        return vector.unweighted()
    if alignment is None and instruction is not None:
        alignment = align(vector, instruction, level or "block", check_base=check_base)
    elif alignment is None:
        alignment = vector.manifest.alignment
        if alignment is None or level not in (None, alignment.level):
            raise WeightingError(
                f"{vector.label} stores no alignment by {level or 'block'}, so the rule {rule!r} needs an instruction vector to measure it with: a "
                "command needs --instruction VECTOR"
            )
    weighted = vector.weighted(
        alignment, default if rule is None else rule, threshold=threshold, outside=outside, instruction_vector=instruction
    )
    # A stored alignment was measured with the instruction vector recorded beside it.
    measured_with = weighted.manifest.instruction_identity if measures else vector.manifest.instruction_identity
    return TaskVector(weighted.tensors, replace(weighted.manifest, start=vector.start, instruction_identity=measured_with))


def from_instruct(vector: TaskVector, instruction: TaskVector | None) -> TaskVector:
    """Return the vector relative to instruct: if it started from base and the instruction vector is given, that is subtracted."""
    return vector if vector.start != "base" or instruction is None else vector.without(instruction)


def check_asked_for(vector: TaskVector) -> None:
    """Refuse stored coefficients that nobody has asked for, if the alignments behind them are too flat to rank layers by.

    Raises:
        WeightingError: The alignments are too flat.
    """
    manifest = vector.manifest
    if manifest.coefficients is None or manifest.asked_for or not follows_alignment(manifest.weighting):
        return
    alignment = manifest.alignment
    if alignment is not None and alignment.level == manifest.level and alignment.flat:
        ways = [f"--weighting {manifest.weighting}"] if manifest.weighting in WEIGHTINGS else []
        ways += [f"--weighting {STORED} for these very coefficients", ".weighted(…)"]
        raise WeightingError(
            f"{vector.label} stores coefficients by the rule {manifest.weighting!r}, and the alignments behind them spread by "
            f"{alignment.spread:.4f}, less than {FLAT_SPREAD}: too little to rank the layers by, so they are not applied unless you ask for it. Ask "
            f"for plain task arithmetic (--weighting none, .unweighted()), or for the rule all the same ({', '.join(ways)})."
        )


def applied(vector: TaskVector) -> list[str]:
    """Return a sentence that says which coefficients a vector is applied with, and a second one if the alignments behind them are too flat."""
    manifest = vector.manifest
    if manifest.coefficients is None:
        return [f"{vector.label}: coefficient 1 for every tensor"]
    numbers = manifest.coefficients.values()
    span = f"{min(numbers):.4g} to {max(numbers):.4g}" if numbers else "none"
    said = f"{vector.label}: coefficients by the rule {manifest.weighting!r}: {span} for {len(numbers)} layers (by {manifest.level})"
    if outside := list(vector.layers.outside()):
        said += f", {manifest.outside:g} for the tensors outside of them, {first_three(outside)}"
    alignment = manifest.alignment
    if alignment is None or alignment.level != manifest.level or not follows_alignment(manifest.weighting) or not alignment.flat:
        return [said]
    return [said, f"{vector.label}: {alignment.spread_warning()}"]
