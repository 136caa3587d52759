"""Whole tensors on rank zero, one at a time, from the parts that the processes of a run hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lata_lightning.alignment import Alignment
from lata_lightning.live.tracker import Tracker
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.hashing import hash_values
from lata_lightning.store.sources import Source
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.manifest import Identity, Manifest, TensorEntry
from lata_lightning.vectors.task_vector import TaskVector

Side = Literal["start", "live"]
_SIDES: tuple[Side, Side] = ("start", "live")
_DONE = -1
_Result = TypeVar("_Result")


def export(tracker: Tracker, write: Callable[[TaskVector], _Result], start: Manifest) -> _Result | None:
    """Hand the task vector to a function on rank zero, while the other processes deliver their parts of each tensor it reads.

    Args:
        tracker: Of this process; its model is looked at anew.
        write: What to do with the vector; runs on rank zero only.
        start: Manifest with everything but tensors and identities.

    Returns:
        What ``write`` returned; None on other ranks.
    """
    tracker.look()
    if tracker.ranks.rank != 0:
        _deliver(tracker)
        return None
    try:
        return write(_task_vector(tracker, start))
    finally:
        tracker.ranks.from_rank(torch.tensor([_DONE, 0]), 0)


def manifest_of(tracker: Tracker, alignment: Alignment | None, step: int, epoch: int) -> Manifest:
    """Manifest of the vector as it now stands, without tensors and identities."""
    return Manifest(kind="task", start=tracker.start, layers=tracker.places, alignment=alignment, step=step, epoch=epoch)


def _task_vector(tracker: Tracker, manifest: Manifest) -> TaskVector:
    live = tracker.live
    sides = {side: _Gathered(tracker, side) for side in _SIDES}
    frozen = [name for name in live.names if name not in tracker.changing]
    # Of tensors that are not written, the identity of the start is to be known all the same.
    still = {name: hash_values(sides["start"].read(name)) for name in [*frozen, *live.adapted] if name not in tracker.unhashable}
    entries = {name: TensorEntry(live.shape(name), "float32", unchanged=True) for name in frozen}
    manifest = replace(manifest, start_identity=Identity(tracker.location), tensors=entries)
    return TaskVector(_LiveDifference(tracker, sides["start"], sides["live"], still), manifest)


class _Gathered(Source):
    """One side of the difference, gathered when it is read."""

    def __init__(self, tracker: Tracker, side: Side) -> None:
        self._tracker, self._side = tracker, side
        self.location = tracker.live.location if side == "start" else None

    @property
    def names(self) -> tuple[str, ...]:
        return self._tracker.live.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tracker.live.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tracker.live.dtype(name)

    def read(self, name: str) -> Tensor:
        request = torch.tensor([self._tracker.live.index[name], _SIDES.index(self._side)])
        self._tracker.ranks.from_rank(request, 0)
        return _gather(self._tracker, name, self._side)


class _LiveDifference(Difference):
    """Live minus start weights; of a tensor under an adapter, what the adapter adds, without a detour over the sum."""

    def __init__(self, tracker: Tracker, start: Source, live: Source, still: Mapping[str, str]) -> None:
        super().__init__(start, live, start.names, known=still)
        self._model, self._tracker = tracker.live, tracker

    def read(self, name: str) -> Tensor:
        factors = self.low_rank(name)
        return super().read(name) if factors is None else factors.dense(self.dtype(name))

    def low_rank(self, name: str) -> LowRank | None:
        return self._tracker.added(name).copy() if name in self._model.adapted else None

    def content_hashes(self) -> tuple[str | None, str | None]:
        start, tuned = super().content_hashes()
        # The sum of a weight and what an adapter adds to it is never formed, so it has no hash.
        return start, None if self._model.adapted else tuned


def _deliver(tracker: Tracker) -> None:
    """Take part in gathering until rank zero has all it wants."""
    while True:
        index, side = tracker.ranks.from_rank(torch.tensor([_DONE, 0]), 0).tolist()
        if index == _DONE:
            return
        _gather(tracker, tracker.live.names[index], _SIDES[side])


def _gather(tracker: Tracker, name: str, side: Side) -> Tensor:
    """A whole tensor on the CPU of rank zero (other ranks get what falls to them). Every process has to call this."""
    live, kept = tracker.live, tracker.kept
    tensor, shard = live.read(name), live.shard(name)
    still = side == "live" or name not in tracker.changing or name in live.adapted
    if not isinstance(tensor, DTensor):
        if still:
            return tensor.cpu()
        owner = tracker.owner(name)
        held = kept.read(name, shard) if tracker.ranks.rank == owner else torch.empty(tensor.shape, dtype=tensor.dtype)
        return tracker.ranks.from_rank(held, owner)
    if not still:
        # Replicas that keep no copy fill in zeros: they gather among themselves, and rank zero is not among them.
        local = kept.read(name, shard).to(tensor.device) if shard.counted else torch.zeros_like(shard.local)
        tensor = DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.full_tensor().cpu()
