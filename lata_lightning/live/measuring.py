"""The sums of every tensor in training over all processes: three, and an inner product for each vector to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lata_lightning.errors import WeightingError, first_three
from lata_lightning.layers import Level
from lata_lightning.live.comparing import StoredVectors
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.matching import matched_to, stored_part
from lata_lightning.live.replicas import differing, sampled_prints
from lata_lightning.live.tracker import Tracker
from lata_lightning.moments import Moments, Start
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import moments_table, same_values, tensor_sums
from lata_lightning.store.meaning import check_same_meaning, meaning_in_memory
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.task_vector import TaskVector


class Sums(NamedTuple):
    """What one pass over the weights gives; the same on every process.

    Attributes:
        moments: The three sums, by tensor.
        inner: Inner product of the vector in training with each vector to compare with, by tensor.
    """

    moments: dict[str, Moments]
    inner: dict[str, list[float]]


class Measurement:
    """The sums of a model in training against its start, an instruction vector, and vectors to compare with.

    Every process of a run has one. Buffers count in no sum. Only sums cross between processes, in one reduction per measurement.

    Args:
        tracker: Follows the model.
        instruction: Instruct minus base; None for norms alone.
        start: What the fine-tune starts from.
        others: Vectors to compare with, by name.
    """

    def __init__(
        self, tracker: Tracker, instruction: TaskVector | None, start: Start, others: Mapping[str, TaskVector] | None = None
    ) -> None:
        self.tracker, self.instruction, self.start = tracker, instruction, start
        self.comparison = StoredVectors(tracker, others or {}, start)
        self._direction: TensorSource | None = None
        self._squares: dict[str, float] = {}
        self._local_squares: dict[str, float] = {}
        self._drifted = False

    def check(self, level: Level, *, weighted: bool) -> None:
        """Bring the instruction vector, and the vectors to compare with, under the names of the model. Every process has to call this.

        Args:
            level: Unit of the layers.
            weighted: Whether every layer needs an alignment.

        Raises:
            LayoutMismatchError: One lacks a parameter, has it in another shape, or belongs to a model of other tokens or another function.
            WeightingError: The instruction vector is zero in a layer that is to be weighted.
        """
        self.comparison.check()
        if self.instruction is not None:
            self._check_instruction(self.instruction, level, weighted=weighted)

    def _check_instruction(self, instruction: TaskVector, level: Level, *, weighted: bool) -> None:
        tracker, ranks = self.tracker, self.tracker.ranks
        what = f"the instruction vector {instruction.label}"
        direction = self._direction = matched_to(tracker.live, instruction.tensors, what, tracker.root, tracker.leave_out)
        check_same_meaning(
            (tracker.live.label, meaning_in_memory(tracker.live.config, tracker.live.location)),
            (what, instruction.manifest.meaning),
        )
        names = [name for name in direction.names if name not in tracker.live.buffers]
        sums = torch.zeros(len(names), 3, dtype=torch.float64)
        for index, name in enumerate(names):
            if index % ranks.world == ranks.rank:
                sums[index] = tensor_sums(stored_part(direction, name))
        table = moments_table(dict(zip(names, ranks.total(sums), strict=True)))
        self._squares = {name: row.task for name, row in table.items()}
        layers = tracker.positions.layers(level)
        empty = [layer for layer, inside in layers.items() if not any(self._squares[name] for name in inside)]
        if empty and weighted:
            raise WeightingError(
                f"the instruction vector is zero in {first_three(empty)} of {len(layers)} layers, so they have no alignment to be weighted by. "
                "Use a coarser level, or weighting='none'."
            )

    def sums(self) -> Sums:
        """Return the sums of every tensor over all processes, the same on each of them.

        Raises:
            CorruptFileError: A sum is not finite: training diverged.
            LataError: The start weights cannot be read any more.
        """
        live = self.tracker.look()
        ranks, ownership = self.tracker.ranks, self.tracker.ownership
        followed = [name for name in live.names if name in self.tracker.changing and name not in live.buffers and name not in live.adapted]
        copies = {name: ownership.copies(name) for name in followed if ownership.copies(name) > 1}
        rows = ranks.agree(lambda: self._own_sums(live))
        totals = ranks.total(torch.cat([sampled_prints(live, copies), rows], dim=1))
        self._warn_of_drift(differing(live.names, totals[:, :2], copies))
        moments = moments_table(dict(zip(live.names, totals[:, 2:5], strict=True)))
        return Sums(moments, dict(zip(live.names, totals[:, 5:].tolist(), strict=True)))

    def _warn_of_drift(self, names: Sequence[str]) -> None:
        if names and not self._drifted and self.tracker.ranks.rank == 0:
            warnings.warn(
                f"{len(names)} parameters of which every process has a copy have come to differ between processes ({first_three(names)}), so the "
                "figures are of one process's values of each. Does the strategy average their gradients?",
                stacklevel=2,
            )
        self._drifted = self._drifted or bool(names)

    def _own_sums(self, live: LiveModel) -> Tensor:
        """Return what this process adds to the sums, of shape (tensors, 3 + vectors to compare with)."""
        tracker = self.tracker
        tracker.start_weights.check_origin()
        rows = torch.zeros(len(live.names), 3 + len(self.comparison.names), dtype=torch.float64)
        for index, name in enumerate(live.names):
            if name in live.buffers:
                continue
            if name not in tracker.changing:
                rows[index, :3] = self._frozen_sums(name) if tracker.ranks.rank == 0 else 0.0
            elif tracker.ownership.leads(name) if name in live.adapted else tracker.counts(name):
                rows[index] = self._sums_of(name)
        return rows

    def _sums_of(self, name: str) -> Tensor:
        """Return the sums over the part of a tensor that this process has."""
        # Without an instruction vector there is nothing to take off, whatever the start was.
        start: Start = self.start if self._direction is not None else "instruct"
        tracker, known = self.tracker, self._local_squares.get(name)
        direction: Tensor | LowRank | None = None
        if name in tracker.live.adapted:
            added = tracker.added(name)
            direction = None if self._direction is None else stored_part(self._direction, name)
            sums = tensor_sums(added, direction, start=start, instruction_squared=known)
            inner = self.comparison.inner(name, added)
        else:
            part = tracker.live.placement(name)
            values, origin = part.values(), tracker.start_weights.read(name, part)
            direction = None if self._direction is None else stored_part(self._direction, name, part.region)
            sums = tensor_sums(values, direction, subtract=origin, start=start, instruction_squared=known)
            inner = self.comparison.inner(name, values, subtract=origin, region=part.region)
            if not torch.isfinite(sums).all() and same_values(values, origin):
                # Equal to the start means unchanged, though infinite entries have no difference.
                sums = tensor_sums(torch.zeros_like(values), direction, start=start, instruction_squared=known)
                inner = torch.zeros_like(inner)
        if direction is not None:
            # Of the part that this process has, which stays the same while it trains.
            self._local_squares[name] = sums[2].item()
        return torch.cat([sums.cpu(), inner])

    def _frozen_sums(self, name: str) -> Tensor:
        square = self._squares.get(name, 0.0)
        # Frozen, so the difference is zero; from base, that means the task vector takes the whole instruction vector back.
        row = [0.0, 0.0, square] if self.start == "instruct" else [-square, square, square]
        return torch.tensor(row, dtype=torch.float64)
