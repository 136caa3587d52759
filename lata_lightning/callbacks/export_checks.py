"""What the exports at the end of training need, tried before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.exports.mergekit import start_for_mergekit
from lata_lightning.exports.plan import plan_of
from lata_lightning.exports.structure import Structure
from lata_lightning.live.measuring import Measurement
from lata_lightning.live.tracker import Tracker
from lata_lightning.numerics.measure import same_values
from lata_lightning.store.mismatches import check_same_shapes
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import match
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import View
from lata_lightning.vectors.provenance import Identity

_ONTO_START = ("hf", "peft", "mergekit")


def check_exports(kinds: Sequence[str], tracker: Tracker, measurement: Measurement) -> None:
    """Refuse exports that cannot be written at the end of training, as far as that can be told at its start.

    Args:
        kinds: The exports to write, as ``check_kinds`` returns them.
        tracker: The tracker of the model, with its start weights settled.
        measurement: The measurement of the run, with its instruction vector checked.

    Raises:
        LataError: ``pure`` without coefficients to come; or, for the kinds that are written onto the start model, a start that lies nowhere, cannot be
            read, has other tensors or other values than training starts from, or a form that the kind cannot take.
    """
    if "pure" in kinds and measurement.instruction is None:
        raise LataError(
            "export pure needs coefficients, and without an instruction vector there are none. Give instruction_vector=…, or export the vector only "
            "and apply a weighting later: lata align VECTOR --instruction INSTRUCTION"
        )
    needy = [kind for kind in kinds if kind in _ONTO_START]
    if not needy:
        return
    try:
        _try_onto_start(needy, tracker, measurement)
    except LataError as error:
        raise LataError(
            f"export {', '.join(needy)} needs the start weights again at the end of training, and {error} Load the model from a directory or hub id, "
            "or export the vector only and hand it over later: lata export VECTOR --to … --onto MODEL"
        ) from error


def _try_onto_start(kinds: Sequence[str], tracker: Tracker, measurement: Measurement) -> None:
    live, instruction = tracker.live, measurement.instruction
    # What started from base is handed over onto the instruct model, once the instruction vector is taken off.
    from_base = measurement.start == "base" and instruction is not None
    onto = Identity(tracker.location) if instruction is None or not from_base else instruction.manifest.tuned_identity
    if onto.location is None:
        raise LataError("the model was not loaded from a directory or hub id.")
    source = open_source(onto.location)
    paired = match(source, live, tracker.leave_out)
    check_same_shapes(paired.start, paired.tuned)
    stored = {paired.tuned.origin_name(name): name for name in paired.start.names}
    if not from_base and not tracker.unhashable:
        wrong = _other_values(tracker, View(paired.start, stored))
        if wrong:
            raise LataError(
                f"training does not start from the values in {onto.location}; other ones, or rounded ones, are in {first_three(wrong)}. Was the model "
                "changed after it was loaded, or is it trained in a lower precision than it is saved in?"
            )
    if "mergekit" in kinds:
        start_for_mergekit(source)
    if "peft" in kinds:
        plan_of(
            [paired.start.origin_name(stored[name]) for name in live.names if name in tracker.changing and name in stored],
            Structure(source),
        )


def _other_values(tracker: Tracker, source: TensorSource) -> list[str]:
    """The tensors of which this process counts a start value that is not exactly that of another source.

    Args:
        tracker: The tracker of the model, with its start weights settled.
        source: The other source, under the names of the live model; tensors that it lacks are ignored. Each tensor is read once.
    """
    live, start_weights, wrong = tracker.live, tracker.start_weights, []
    for name in set(live.names) & set(source.names):
        part = live.placement(name)
        if (start_weights.sourced(name) and part.keeps(source.dtype(name))) or not tracker.counts(name):
            continue
        start = start_weights.read(name, part) if start_weights.has(name) else part.values()
        # Not rounded to the precision of the live tensor: what is written later is added to the values of the source.
        wide = torch.promote_types(start.dtype, source.dtype(name))
        if not same_values(start.to(wide), part.region.read(source, name).to(wide)):
            wrong.append(name)
    return wrong
