"""Removing the instruction-vector component from a task vector, layer by layer."""

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
from lata_lightning.vectors.provenance import OUTSIDE, PROJECTED, Derivation, Input, LayerValues
from lata_lightning.vectors.task_vector import TaskVector


def project(vector: TaskVector, instruction_vector: TaskVector, *, level: Level = "tensor", check_base: bool = True) -> TaskVector:
    """Return the vector minus its projection on the instruction vector, in every layer.

    τ − (⟨τ, τ_instr⟩ / ‖τ_instr‖²) · τ_instr. The instruction-vector component is removed whatever the vector started from: a vector that
    started from base contains the instruction vector and loses it; one that started from instruct hardly changes. So the start need not be known.

    Args:
        vector: Task vector; its coefficients, if it has any, are ignored.
        instruction_vector: Instruct minus base, with the same tensors.
        level: The unit that is projected; the default preserved most in our comparison. All tensors that belong to no layer are projected
            together, as one more layer.
        check_base: Refuse an instruction vector of which neither side is known to be the vector's start.

    Returns:
        A vector that starts from instruct, computed when it is read; no input changes. Its manifest records the multiples that were removed. A layer in
        which the instruction vector is zero stays as it is. Tensors in factors, as those of LoRA, stay in factors where nothing is removed or
        the instruction vector is in factors too; otherwise they become dense. Tensors that neither vector changes are not stored.

    Raises:
        LayoutMismatchError: The vectors do not have the same tensors.
        BaseMismatchError: The instruction vector belongs to other weights.
        CorruptFileError: NaN or infinite weights.
        LataError: The level is unknown.

    Source: this package's own method. The rules of LATA, arXiv:2502.20186, shrink such layers as a whole instead.
    """
    check_level(level)
    if check_base:
        _check_either_side(vector, instruction_vector)
    table, instruction = measure(vector, instruction_vector), weights_along(vector, instruction_vector)
    names_by_layer = vector.layers.layers(level)

    def share(names: Iterable[str]) -> float:
        sums = total(table[name] for name in names)
        return sums.inner / sums.instruction if sums.instruction else 0.0

    shares = {layer: share(names) for layer, names in names_by_layer.items()}
    share_outside = share(vector.layers.outside())
    share_of = {name: shares[layer] for layer, names in names_by_layer.items() for name in names}

    def removed(name: str) -> float:
        """Return the multiple of the instruction vector that is subtracted from a tensor; 0 where the instruction vector is zero."""
        return 0.0 if instruction.origin_name(name) in instruction_vector.unchanged else share_of.get(name, share_outside)

    unchanged = {name for name in vector.unchanged & set(instruction.names) if not removed(name)}
    sides, origin = instruction_vector.manifest, vector.manifest.start_identity
    # Known weights say more than what the vector calls its start. The result must name the model that it starts from now, which a merge asks for.
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
            measured=(LayerValues(PROJECTED, {**shares, OUTSIDE: share_outside}),),
        ),
        precision_loss=None,
        tensors={name: TensorEntry(vector.shape(name), "float32", unchanged=True) for name in unchanged},
    )
    return TaskVector(_difference(vector, instruction, removed), manifest)


def _difference(vector: TaskVector, instruction: View, removed: Callable[[str], float]) -> TensorSource:
    """Return the vector minus a multiple of the instruction vector in each tensor; factors stay factors where both sides allow it."""
    along = f"its projection on {instruction.label}"
    less = Scaled(instruction, lambda name: -removed(name), f"minus {along}")
    both = Difference(Scaled(instruction, removed, along), vector.tensors, instruction.names, identify=False)

    def source_of(name: str) -> TensorSource:
        if not removed(name):
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
            f"{vector.label} started from {origin.location}, and {instruction_vector.label} is between {sides.start_identity.location} and "
            f"{sides.tuned_identity.location}: these are different weights. Extract the instruction vector from the models of the fine-tune, "
            " or switch the check off (check_base=False, --check-base false)."
        )
