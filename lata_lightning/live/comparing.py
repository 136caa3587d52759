"""The angle between a vector in training and vectors that are stored: of experts for other tasks, say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import LayerMap, Level
from lata_lightning.live.matching import matched_to, stored_part
from lata_lightning.live.placements.region import Region
from lata_lightning.live.tracker import Tracker
from lata_lightning.moments import Moments, Start
from lata_lightning.numerics.inner_products import inner_products
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import tensor_sums
from lata_lightning.store.meaning import check_same_meaning, meaning_in_memory
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.task_vector import TaskVector

_NAME = re.compile(r"[\w.-]+")


class Cosines(NamedTuple):
    """Cosine of the vector in training with a stored one, dimensionless, in [-1, 1].

    Attributes:
        whole: Over all tensors that the stored vector has; None where one of the two is zero.
        layers: By layer; absent where one of the two is zero.
    """

    whole: float | None
    layers: Mapping[str, float]


class StoredVectors:
    """Stored vectors under the names of the model in training.

    Args:
        tracker: The tracker of the model in training.
        vectors: Each vector by the name under which its cosines are logged.
        start: Whether the fine-tune starts from base or from instruct.
    """

    def __init__(self, tracker: Tracker, vectors: Mapping[str, TaskVector], start: Start) -> None:
        self._tracker, self._vectors, self._start = tracker, vectors, start
        self._sources: dict[str, TensorSource] = {}
        self._squares: dict[str, dict[str, float]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored vectors."""
        return tuple(self._vectors)

    def check(self) -> None:
        """Bring the vectors under the names of the model, and measure their lengths. Every process has to call this.

        Raises:
            LayoutMismatchError: A vector lacks a parameter, has it in another shape, or belongs to a model of other tokens or another function.
            LataError: A vector started from another kind of weights, or is zero.
        """
        live, ranks = self._tracker.live, self._tracker.ranks
        for name, vector in self._vectors.items():
            what = f"the vector {vector.label} to compare with"
            if vector.manifest.kind == "task" and vector.start != self._start:
                raise LataError(
                    f"{what} started from {vector.start}, and this fine-tune starts from {self._start}, so the two have no common origin. Compare with "
                    "vectors that started from the same weights, or leave it out of compare_with."
                )
            # What was left out of the vector need not be in it.
            leave_out = LeaveOut((*self._tracker.leave_out.patterns, *vector.manifest.leave_out), self._tracker.leave_out.names)
            source = matched_to(live, vector.tensors, what, self._tracker.root, leave_out)
            check_same_meaning((live.label, meaning_in_memory(live.config, live.location)), (what, vector.manifest.meaning))
            listed = [tensor for tensor in source.names if tensor not in live.buffers]
            squares = torch.zeros(len(listed), dtype=torch.float64)
            for index, tensor in enumerate(listed):
                if index % ranks.world == ranks.rank:
                    squares[index] = tensor_sums(stored_part(source, tensor))[1].cpu()
            self._sources[name] = source
            self._squares[name] = dict(zip(listed, ranks.total(squares).tolist(), strict=True))
            if not math.isfinite(sum(self._squares[name].values())) or not any(self._squares[name].values()):
                raise LataError(
                    f"{what} is zero in every tensor, or not finite, so it has no direction to compare with. Leave it out of compare_with."
                )

    def inner(self, tensor: str, vector: Tensor | LowRank, *, subtract: Tensor | None = None, region: Region | None = None) -> Tensor:
        """Return the inner products of a part of the vector in training with that of each stored one, float64 of shape (vectors,).

        Args:
            tensor: Name of the tensor.
            vector: Tuned minus start, or its factors; or the tuned weights, where ``subtract`` is given.
            subtract: The start weights.
            region: The part of the tensor that ``vector`` is.
        """
        row = torch.zeros(len(self._vectors), dtype=torch.float64)
        numbers = [number for number, name in enumerate(self.names) if self._squares[name].get(tensor)]
        if numbers:
            others = [stored_part(self._sources[self.names[number]], tensor, region) for number in numbers]
            row[numbers] = inner_products(vector, others, subtract=subtract)
        return row

    def cosines(
        self, moments: Mapping[str, Moments], inner: Mapping[str, Sequence[float]], layers: LayerMap, level: Level
    ) -> dict[str, Cosines]:
        """Return the cosine of the vector in training with each stored one, by its name.

        Args:
            moments: Sums of the vector in training, by tensor.
            inner: Its inner product with each stored vector, by tensor.
            layers: Layer of each tensor.
            level: Unit of the layers.
        """
        # A vector from base contains the instruction vector, which the moments of the task vector do not.
        from_base = self._start == "base"
        lengths = {name: max(row.task + 2 * row.inner + row.instruction, 0.0) if from_base else row.task for name, row in moments.items()}
        result = {}
        for number, (name, squares) in enumerate(self._squares.items()):
            rows = {tensor: (inner[tensor][number], lengths[tensor], square) for tensor, square in squares.items()}
            by_layer = {
                layer: _cosine([rows[tensor] for tensor in inside if tensor in rows]) for layer, inside in layers.layers(level).items()
            }
            result[name] = Cosines(_cosine(rows.values()), {layer: value for layer, value in by_layer.items() if value is not None})
        return result


def _cosine(rows: Iterable[tuple[float, float, float]]) -> float | None:
    """Return the cosine from inner product and two squared lengths of each tensor; None where a side is zero."""
    product, own, other = (math.fsum(column) for column in zip((0.0, 0.0, 0.0), *rows, strict=True))
    return max(-1.0, min(1.0, product / math.sqrt(own) / math.sqrt(other))) if own > 0 and other > 0 else None


def check_names(given: Mapping[str, str | Path | TaskVector] | None) -> dict[str, str | Path | TaskVector]:
    """Return what is to be compared with, by name; refuse names that cannot be part of a logged key.

    Raises:
        LataError: A name has other characters than letters, digits and ``. _ -``.
    """
    wrong = [name for name in given or {} if not _NAME.fullmatch(name)]
    if wrong:
        raise LataError(
            f"names of vectors to compare with are part of logged keys, so they may have letters, digits and . _ - only; got {first_three(wrong)}"
        )
    return dict(given or {})


def open_vectors(given: Mapping[str, str | Path | TaskVector] | None) -> dict[str, TaskVector]:
    """Return the vectors to compare with, opened.

    Raises:
        LataError: A name cannot be part of a logged key.
        SourceError: A path has no vector.
    """
    return {name: vector if isinstance(vector, TaskVector) else TaskVector.open(vector) for name, vector in check_names(given).items()}
