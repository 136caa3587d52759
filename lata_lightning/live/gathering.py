"""Whole tensors on rank zero, one at a time, from the parts that the processes of a run hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Literal, TypeVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.alignment import Alignment
from lata_lightning.errors import first_three
from lata_lightning.layers import LayerMap
from lata_lightning.live.tracker import Tracker
from lata_lightning.moments import Start
from lata_lightning.numerics.chunks import ChunkReader, factor_chunks
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import same_values
from lata_lightning.store.hashing import hash_values
from lata_lightning.store.meaning import meaning_in_memory
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Wrapping
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import Manifest
from lata_lightning.vectors.provenance import Identity
from lata_lightning.vectors.task_vector import TaskVector

GatheredWeights = Literal["start", "live"]
_GATHERED: tuple[GatheredWeights, GatheredWeights] = ("start", "live")
_DONE = -1
_Result = TypeVar("_Result")


def export(tracker: Tracker, write: Callable[[TaskVector], _Result], start: Manifest) -> _Result | None:
    """Hand the task vector to a function on rank zero, while the other processes deliver their parts of each tensor it reads.

    Args:
        tracker: The tracker on this process. It looks at its model once more.
        write: What to do with the vector; runs on rank zero only.
        start: Manifest with everything but tensors and identities.

    Returns:
        What ``write`` returned; None on other ranks.
    """
    tracker.look()
    moved = tracker.moved_frozen()
    still, lost = _states(tracker)
    if tracker.ranks.rank != 0:
        _deliver(tracker)
        return None
    try:
        return write(_task_vector(tracker, start, still - set(moved), lost, moved))
    finally:
        tracker.ranks.from_rank(torch.tensor([_DONE, 0]), 0)


def manifest_of(tracker: Tracker, start: Start, alignment: Alignment | None, step: int | None, epoch: int | None) -> Manifest:
    """Return the manifest of the vector as it is now, without tensors and identities."""
    left_out = (*tracker.leave_out.patterns, *tracker.head.patterns)
    return Manifest(kind="task", start=start, layers=tracker.positions, alignment=alignment, step=step, epoch=epoch, leave_out=left_out)


def _states(tracker: Tracker) -> tuple[frozenset[str], frozenset[str]]:
    """Tensors that are exported as unchanged, and buffers that cannot be exported; the same on every process.

    Unchanged are frozen tensors, buffers equal to their start, and parameters that are equal to it and hold infinite entries. Buffers that
    changed have no difference where their shape changed, or where they are not finite.
    """
    live = tracker.live
    names = [name for name in live.names if name in tracker.changing and name not in live.adapted]
    flags = torch.zeros(len(names), 2, dtype=torch.int64)
    for index, name in enumerate(names):
        if not tracker.counts(name):
            continue
        part = live.placement(name)
        values = part.values()
        finite = bool(torch.isfinite(values).all())
        if finite and name not in live.buffers:
            # Whether it moved shows in the difference, which is written anyway.
            flags[index, 0] = 1
            continue
        origin = tracker.start_weights.read(name, part)
        moved = not same_values(values, origin)
        exact = finite and origin.shape == values.shape and bool(torch.isfinite(origin).all())
        flags[index] = torch.tensor([moved, moved and not exact and name in live.buffers])
    columns = tracker.ranks.total(flags).T.tolist()
    moved_names, lost = ({name for name, flag in zip(names, column, strict=True) if flag} for column in columns)
    return frozenset(set(live.names) - live.adapted - moved_names), frozenset(lost)


def _task_vector(tracker: Tracker, manifest: Manifest, still: Set[str], lost: Set[str], moved: Sequence[str]) -> TaskVector:
    live = tracker.live
    if lost:
        warnings.warn(
            f"buffers that changed their shape, or hold infinite values and changed, are left out of the task vector: {first_three(lost)}",
            stacklevel=2,
        )
    if moved:
        said = "" if manifest.alignment is None else " Alignments took them for unchanged, so none is stored: measure them with lata align."
        warnings.warn(
            "tensors were changed while they asked for no gradient, and are left out of the task vector, as their start was not kept: "
            f"{first_three(moved)}.{said}",
            stacklevel=2,
        )
        manifest, lost = replace(manifest, alignment=None), lost | set(moved)
    names = tuple(name for name in live.names if name not in lost)
    sides = {side: _Gathered(tracker, side, names) for side in _GATHERED}
    unread = [name for name in names if (name in still or name in live.adapted) and name not in tracker.unhashable]
    # Of tensors that are not written, the identity of the start is to be known all the same.
    known = {name: hash_values(sides["start"].read(name)) for name in unread}
    entries = {name: TensorEntry(live.shape(name), "float32", unchanged=True) for name in names if name in still}
    layers = LayerMap({name: manifest.layers.positions[name] for name in names}, manifest.layers.blocks)
    manifest = replace(
        manifest,
        layers=layers,
        start_identity=Identity(tracker.location),
        meaning=meaning_in_memory(live.config, tracker.location or live.location),
        tied=live.ties(names),
        tensors=entries,
        leave_out=(*manifest.leave_out, *(f"^{re.escape(name)}$" for name in sorted(lost))),
    )
    return TaskVector(_LiveDifference(tracker, sides["start"], sides["live"], known, still), manifest)


@final
class _Gathered(TensorSource):
    """One side of the difference, gathered when it is read."""

    def __init__(self, tracker: Tracker, side: GatheredWeights, names: tuple[str, ...]) -> None:
        super().__init__(Origin(tracker.live.location if side == "start" else None))
        self._tracker, self._side, self._names = tracker, side, names

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._names

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._tracker.live.shape(name)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._tracker.live.dtype(name)

    @override
    def read(self, name: str) -> Tensor:
        request = torch.tensor([self._tracker.live.index[name], _GATHERED.index(self._side)])
        self._tracker.ranks.from_rank(request, 0)
        return _gather(self._tracker, name, self._side)


@final
class _LiveDifference(Wrapping):
    """Live minus start weights; of a tensor under an adapter, what the adapter adds, without a detour over the sum."""

    def __init__(self, tracker: Tracker, start: TensorSource, live: TensorSource, known: Mapping[str, str], still: Set[str]) -> None:
        super().__init__(Difference(start, live, start.names, known=known))
        self._model, self._tracker, self._still = tracker.live, tracker, still

    @override
    def read(self, name: str) -> Tensor:
        if name in self._still:
            return torch.zeros(self.shape(name))
        factors = self.low_rank(name)
        return super().read(name) if factors is None else factors.dense(self.dtype(name))

    @override
    def chunks(self, name: str) -> ChunkReader:
        factors = self.low_rank(name)
        return super().chunks(name) if factors is None else factor_chunks(factors)

    @override
    def low_rank(self, name: str) -> LowRank | None:
        return self._tracker.added(name).copy() if name in self._model.adapted else None

    @override
    def sides(self, name: str) -> tuple[TensorSource, TensorSource, str] | None:
        return None if name in self._model.adapted else super().sides(name)

    @override
    def content_hashes(self) -> tuple[str | None, str | None]:
        start, tuned = self._source.content_hashes()
        # The sum of a weight and what an adapter adds to it is never formed, so it has no hash.
        return start, None if self._model.adapted else tuned


def _deliver(tracker: Tracker) -> None:
    """Take part in gathering until rank zero has all it wants."""
    while True:
        index, side = tracker.ranks.from_rank(torch.tensor([_DONE, 0]), 0).tolist()
        if index == _DONE:
            return
        _gather(tracker, tracker.live.names[index], _GATHERED[side])


def _gather(tracker: Tracker, name: str, side: GatheredWeights) -> Tensor:
    """A whole tensor on the CPU of rank zero; its values are undefined on other ranks. Every process has to call this."""
    live = tracker.live
    part = live.placement(name)
    unchanged = side == "live" or name not in tracker.changing or name in live.adapted
    if unchanged and part.replicated:
        return part.values().cpu()
    values = None
    if tracker.counts(name):
        values = part.values() if unchanged else tracker.start_weights.read(name, part)
    return tracker.ownership.gather(name, values, part.shape, part.dtype)
