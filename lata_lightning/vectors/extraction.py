"""The difference of two sets of weights, as the source and the manifest of a task vector."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import nn

from lata_lightning.layers import STATISTICS, DeferredLayerMap, LayerMap, LayerPosition, LayerRule, layer_map
from lata_lightning.moments import Start, check_start
from lata_lightning.store.adapters import AdapterDifference
from lata_lightning.store.meaning import difference_meaning
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.mismatches import check_same_shapes
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.opening import Weights, narrowed, open_difference, open_source
from lata_lightning.store.pairing import match, measured_names
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.tied_names import ties_by_alias, ties_of
from lata_lightning.store.views import View
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import Kind, Manifest
from lata_lightning.vectors.provenance import Identity


@dataclass(frozen=True)
class _Extracted:
    """A difference, and what is known about it.

    Attributes:
        start, tuned: Its two sides.
        tensors: The difference.
        unchanged: Names of the tensors that are known to be zero.
        statistics: Names of the buffers.
        every: Names of all tensors of both sides.
        alone: Names of tensors that only one side has and that are left out.
    """

    start: TensorSource
    tuned: TensorSource
    tensors: TensorSource
    every: Sequence[str]
    alone: Sequence[str]
    unchanged: Set[str] = frozenset()
    statistics: frozenset[str] = frozenset()


def difference_between(
    start: Weights,
    tuned: Weights,
    *,
    kind: Kind,
    start_kind: Start,
    layers: LayerRule | str | None,
    check_config: bool,
    leave_out: Sequence[str] | LeaveOut,
    model: str | None,
) -> tuple[TensorSource, Manifest]:
    """Return tuned minus start as a source, and what is known about it (see ``TaskVector.between``, which describes arguments and errors)."""
    start, tuned = narrowed([start, tuned], model)
    start_source = open_source(start)
    aliases = start_source.tied
    # Patterns of this call must match something; those of a LeaveOut may be meant for another vector.
    left_out, to_check = (leave_out, NOTHING) if isinstance(leave_out, LeaveOut) else (LeaveOut(leave_out),) * 2
    added = open_difference(tuned, start_source)
    if added is not None:
        extracted = _of_adapter(start_source, added, left_out, to_check)
    else:
        modules = [side for side in (start, tuned) if isinstance(side, nn.Module)]
        extracted = _of_weights(start_source, open_source(tuned), modules, left_out, to_check)
    names = extracted.tensors.names
    meaning = difference_meaning(extracted.start, extracted.tuned, compared=check_config)
    manifest = Manifest(
        kind=kind,
        start=check_start("base" if kind == "instruction" else start_kind),
        layers=_layers(extracted, start if isinstance(start, nn.Module) else None, layers),
        start_identity=Identity(extracted.start.location, extracted.start.revision),
        tuned_identity=Identity(extracted.tuned.location, extracted.tuned.revision),
        meaning=meaning,
        tied=ties_of(start, names) if isinstance(start, nn.Module) else ties_by_alias(aliases, names),
        tensors={name: TensorEntry(extracted.tensors.shape(name), "float32", unchanged=True) for name in extracted.unchanged},
        leave_out=(*left_out.used(extracted.every), *(f"^{re.escape(name)}$" for name in extracted.alone)),
    )
    return extracted.tensors, manifest


def _of_adapter(start: TensorSource, added: AdapterDifference, left_out: LeaveOut, to_check: LeaveOut) -> _Extracted:
    every = (*added.names, *added.left_out)
    to_check.check_used(every, added.label)
    names = [name for name in added.names if not left_out(name)]
    tensors = added if len(names) == len(added.names) else View(added, {name: name for name in names})
    return _Extracted(start, added, tensors, every, added.left_out, unchanged=added.unchanged & set(names))


def _of_weights(
    start: TensorSource, tuned: TensorSource, modules: Sequence[nn.Module], left_out: LeaveOut, to_check: LeaveOut
) -> _Extracted:
    every = (*start.names, *tuned.names)
    to_check.check_used(every, f"{start.label} and {tuned.label}")
    pairing = match(start, tuned, left_out)
    check_same_shapes(pairing.start, pairing.tuned)
    names, statistics = measured_names(pairing, modules, start.config or tuned.config)
    tensors = Difference(pairing.start, pairing.tuned, names)
    return _Extracted(pairing.start, pairing.tuned, tensors, every, pairing.left_out, statistics=statistics)


def _layers(extracted: _Extracted, module: nn.Module | None, rule: LayerRule | str | None) -> LayerMap:
    def build() -> LayerMap:
        weights = [name for name in extracted.tensors.names if name not in extracted.statistics]
        structure = meta_model(extracted.start.config) if module is None else module
        by_layer = layer_map(weights, structure=structure, rule=rule)
        positions = {**by_layer.positions, **dict.fromkeys(extracted.statistics, LayerPosition(None, STATISTICS))}
        return LayerMap({name: positions[name] for name in extracted.tensors.names}, by_layer.blocks)

    # A rule is tried at once, as it may be wrong.
    return build() if rule is not None else DeferredLayerMap(build, extracted.statistics)
