"""The part of a task vector that lies across instruction following, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lata_lightning.errors import BaseMismatchError
from lata_lightning.layers import Level, check_level
from lata_lightning.moments import STARTS, total
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Chosen, Scaled, View
from lata_lightning.vectors.aligning import check_matching_instruction, measure, weights_along
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import OUTSIDE, PROJECTED, Derivation, Input, Measured
from lata_lightning.vectors.task_vector import TaskVector


def project(vector: TaskVector, instruction_vector: TaskVector, *, level: Level = "tensor", check_base: bool = True) -> TaskVector:
    """The vector less its projection on the instruction vector, in every layer.

    τ − (⟨τ, τ_instr⟩ / ‖τ_instr‖²) · τ_instr. What a vector shares with instruction following is taken off whole, whatever the vector started from: one
    that started from base holds the instruction vector, and loses it; one that started from instruct hardly changes. So it need not be known which.

    Args:
        vector: Task vector. Coefficients it may have do not count.
        instruction_vector: Instruct minus base, with the same tensors.
        level: The unit that is projected; the smallest kept most in the comparisons of this package. Tensors that belong to no layer are projected
            together, as one layer more.
        check_base: Refuse an instruction vector that is known to have neither side in common with the vector's start.

    Returns:
        A vector that counts from instruct, computed when it is read; no input changes. Its manifest holds the shares that were taken off. A layer in
        which the instruction vector is zero stays as it is. Tensors in factors, as those of LoRA, stay in factors where nothing is taken off or
        the instruction vector is in factors too; otherwise they become dense. What neither vector changes is stored by neither.

    Raises:
        LayoutMismatchError: The vectors do not hold the same tensors.
        BaseMismatchError: The instruction vector belongs to other weights.
        CorruptFileError: NaN or infinite weights.
        LataError: The level is unknown.

    Source: the projection is this package's own candidate beside the rules of LATA, arXiv:2502.20186, which make such layers smaller as a whole.
    """
    check_level(level)
    if check_base:
        _check_either_side(vector, instruction_vector)
    table, instruction = measure(vector, instruction_vector), weights_along(vector, instruction_vector)
    places = vector.layers.layers(level)

    def share(names: Iterable[str]) -> float:
        sums = total(table[name] for name in names)
        return sums.inner / sums.instruction if sums.instruction else 0.0

    shares = {layer: share(names) for layer, names in places.items()}
    share_outside = share(vector.layers.outside())
    share_of = {name: shares[layer] for layer, names in places.items() for name in names}

    def taken(name: str) -> float:
        """Multiple of the instruction vector that is taken off a tensor; 0 where that is zero itself."""
        return 0.0 if instruction.origin_name(name) in instruction_vector.unchanged else share_of.get(name, share_outside)

    unchanged = {name for name in vector.unchanged & set(instruction.names) if not taken(name)}
    sides, origin = instruction_vector.manifest, vector.manifest.start_identity
    # Known weights say more than what the vector calls its start: who merges the result is asked for the model that it now counts from.
    from_base = vector.start == "base" or (origin.content_hash is not None and origin.content_hash == sides.start_identity.content_hash)
    manifest = replace(
        vector.unweighted().manifest,
        start="instruct",
        start_identity=sides.tuned_identity if from_base else origin,
        alignment=None,
        instruction_identity=(sides.start_identity, sides.tuned_identity),
        derivation=Derivation(
            "projection",
            {"level": level},
            (Input(vector.label, vector.manifest.tuned_identity),),
            measured=(Measured(PROJECTED, {**shares, OUTSIDE: share_outside}),),
        ),
        precision_loss=None,
        tensors={name: TensorEntry(vector.shape(name), "float32", unchanged=True) for name in unchanged},
    )
    return TaskVector(_across(vector, instruction, taken), manifest)


def _across(vector: TaskVector, instruction: View, taken: Callable[[str], float]) -> TensorSource:
    """The vector less a multiple of the instruction vector in each tensor; factors stay factors where both sides allow it."""
    along = f"its projection on {instruction.label}"
    less = Scaled(instruction, lambda name: -taken(name), f"minus {along}")
    both = Difference(Scaled(instruction, taken, along), vector.tensors, instruction.names, identify=False)

    def source_of(name: str) -> TensorSource:
        if not taken(name):
            return vector.tensors
        return less if name in vector.unchanged else both

    return Chosen({name: source_of(name) for name in instruction.names}, both.label)


def _check_either_side(vector: TaskVector, instruction_vector: TaskVector) -> None:
    refused: list[BaseMismatchError] = []
    for start in STARTS:
        try:
            check_matching_instruction(vector, instruction_vector, start)
        except BaseMismatchError as error:
            refused.append(error)
    if len(refused) == len(STARTS):
        origin, sides = vector.manifest.start_identity, instruction_vector.manifest
        raise BaseMismatchError(
            f"{vector.label} started from {origin.location}, and {instruction_vector.label} lies between {sides.start_identity.location} and "
            f"{sides.tuned_identity.location}: these are different weights. Extract the instruction vector from the models that the fine-tune "
            "belongs to, or switch the check off (check_base=False, --check-base false)."
        )
