"""The three sums of every tensor in training, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lata_lightning.errors import WeightingError, first_three
from lata_lightning.layers import Level
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.matching import matched_to
from lata_lightning.live.tracker import Tracker
from lata_lightning.moments import Moments, Start
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import moments_table, same_values, tensor_sums
from lata_lightning.store.meaning import check_same_meaning, meaning_in_memory
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.task_vector import TaskVector


class Measurement:
    """The sums of a model in training against its start and an instruction vector.

    Every process of a run has one. Buffers count in no sum. Only sums cross between processes, in one reduction per measurement.

    Args:
        tracker: Follows the model.
        instruction: Instruct minus base; None for norms alone.
        start: What the fine-tune starts from.
    """

    def __init__(self, tracker: Tracker, instruction: TaskVector | None, start: Start) -> None:
        self.tracker, self.instruction, self.start = tracker, instruction, start
        self._direction: TensorSource | None = None
        self._squares: dict[str, float] = {}
        self._local_squares: dict[str, float] = {}

    def check_instruction(self, level: Level, *, weighted: bool) -> None:
        """Bring the instruction vector under the names of the model.

        Args:
            level: Unit of the layers.
            weighted: Whether every layer needs an alignment.

        Raises:
            LayoutMismatchError: It lacks a parameter, holds it in another shape, or belongs to a model of other tokens or another function.
            WeightingError: It is zero in a layer that is to be weighted.
        """
        if self.instruction is None:
            return
        tracker, ranks = self.tracker, self.tracker.ranks
        what = f"the instruction vector {self.instruction.label}"
        direction = self._direction = matched_to(tracker.live, self.instruction.tensors, what, tracker.root, tracker.leave_out)
        check_same_meaning(
            (tracker.live.label, meaning_in_memory(tracker.live.config, tracker.live.location)),
            (what, self.instruction.manifest.meaning),
        )
        names = [name for name in direction.names if name not in tracker.live.buffers]
        sums = torch.zeros(len(names), 3, dtype=torch.float64)
        for index, name in enumerate(names):
            if index % ranks.world == ranks.rank:
                sums[index] = tensor_sums(_stored(direction, name))
        table = moments_table(dict(zip(names, ranks.total(sums), strict=True)))
        self._squares = {name: row.task for name, row in table.items()}
        layers = tracker.positions.layers(level)
        empty = [layer for layer, inside in layers.items() if not any(self._squares[name] for name in inside)]
        if empty and weighted:
            raise WeightingError(
                f"the instruction vector is zero in {first_three(empty)} of {len(layers)} layers, so they have no alignment to be weighted by. "
                "Use a coarser level, or weighting='none'."
            )

    def moments(self) -> dict[str, Moments]:
        """The sums of every tensor over all processes, the same on each of them.

        Raises:
            CorruptFileError: A sum is not finite: training diverged.
            LataError: The start weights cannot be read any more.
        """
        live = self.tracker.look()
        rows = self.tracker.ranks.agree(lambda: self._own_sums(live))
        return moments_table(dict(zip(live.names, self.tracker.ranks.total(rows), strict=True)))

    def _own_sums(self, live: LiveModel) -> Tensor:
        """What this process adds to the sums, of shape (tensors, 3)."""
        tracker = self.tracker
        tracker.start_weights.check_origin()
        rows = torch.zeros(len(live.names), 3, dtype=torch.float64)
        for index, name in enumerate(live.names):
            if name in live.buffers:
                continue
            if name not in tracker.changing:
                rows[index] = self._frozen_sums(name) if tracker.ranks.rank == 0 else 0.0
            elif tracker.counts(name):
                rows[index] = self._sums_of(name)
        return rows

    def _sums_of(self, name: str) -> Tensor:
        # Without an instruction vector there is nothing to take off, whatever the start was.
        start: Start = self.start if self._direction is not None else "instruct"
        tracker, known = self.tracker, self._local_squares.get(name)
        shard = tracker.live.shard(name)
        direction: Tensor | LowRank | None = None
        if self._direction is not None:
            direction = _stored(self._direction, name) if shard.slices is None else self._direction.read_slice(name, shard.slices)
        if name in tracker.live.adapted:
            sums = tensor_sums(tracker.added(name), direction, start=start, instruction_squared=known)
        else:
            origin = tracker.start_weights.read(name, shard)
            sums = tensor_sums(shard.local, direction, subtract=origin, start=start, instruction_squared=known)
            if not torch.isfinite(sums).all() and same_values(shard.local, origin):
                # Equal to the start means unchanged, though infinite entries have no difference.
                sums = tensor_sums(torch.zeros_like(shard.local), direction, start=start, instruction_squared=known)
        if direction is not None:
            # Of the part that this process holds, which stays the same while it trains.
            self._local_squares[name] = sums[2].item()
        return sums.cpu()

    def _frozen_sums(self, name: str) -> Tensor:
        square = self._squares.get(name, 0.0)
        # Frozen, so the difference is zero; from base, that means the task vector takes the whole instruction vector back.
        row = [0.0, 0.0, square] if self.start == "instruct" else [-square, square, square]
        return torch.tensor(row, dtype=torch.float64)


def _stored(source: TensorSource, name: str) -> Tensor | LowRank:
    """A tensor in the form a source holds it in, for sums that do not need the dense one."""
    return source.low_rank(name) or source.read(name)
