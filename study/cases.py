"""What a method is given: the models of one merge, their vectors, and the data it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError
from lata_lightning.layers import Level
from lata_lightning.moments import Start
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

Weights = Mapping[str, Tensor]
Batch = Mapping[str, Tensor]
CALIBRATION_ROWS = 32
"""Training rows of each task that methods may look at."""


@dataclass(frozen=True)
class Case:
    """The models of one merge, and what methods may look at.

    Attributes:
        start: What the experts were tuned from: the weights of instruct or of base.
        instruct: The instruction-following model.
        base: The raw language model it was made from.
        experts: The tuned models; one is enough for the rows that weight a single vector.
        seed: Of everything random.
        calibration: For each expert batches of inputs of the model from its TRAINING task, with an ``attention_mask`` where padded.
        model: Scratch for methods that run data; its weights are whatever the last one left.
        adapters: The experts as models wrapped by peft, where they are adapters; their vectors are then held as factors.
        validation_score: Of a model's weights, higher is better; only few-shot tuning uses it.
    """

    start: Weights
    instruct: Weights
    base: Weights
    experts: tuple[Weights, ...]
    seed: int
    calibration: Sequence[Sequence[Batch]]
    model: Any
    validation_score: Callable[[Weights], float]
    adapters: tuple[Any, ...] = ()

    @cached_property
    def start_kind(self) -> Start:
        """What the experts were tuned from.

        Raises:
            LataError: ``start`` holds neither the weights of instruct nor those of base.
        """
        known: dict[Start, Weights] = {"instruct": self.instruct, "base": self.base}
        for kind, weights in known.items():
            if all(torch.equal(tensor, weights[name]) for name, tensor in self.start.items()):
                return kind
        raise LataError(
            "the start of a case must be its instruct or its base model, and is neither. Give the weights the experts were tuned from."
        )

    @cached_property
    def instruction(self) -> TaskVector:
        """Instruct − base."""
        return TaskVector.between(self.base, self.instruct, kind="instruction")

    @cached_property
    def vectors(self) -> list[TaskVector]:
        """Expert − start."""
        if self.adapters:
            return [TaskVector.between(self.start, adapter, start_kind=self.start_kind) for adapter in self.adapters]
        return [TaskVector.between(self.start, expert, start_kind=self.start_kind) for expert in self.experts]

    @cached_property
    def anchored(self) -> list[TaskVector]:
        """Expert − instruct; where the experts were tuned from base, the complex vectors less the instruction vector."""
        return [vector.without(self.instruction) if vector.start == "base" else vector for vector in self.vectors]

    def alignments(self, level: Level) -> list[Alignment]:
        """Of every expert with the instruction vector."""
        if level not in self._alignments:
            self._alignments[level] = [align(vector, self.instruction, level) for vector in self.vectors]
        return self._alignments[level]

    @cached_property
    def _alignments(self) -> dict[Level, list[Alignment]]:
        return {}


def summed(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """Σ of vectors, in float64, rounded once to float32."""
    return {name: torch.stack([vector[name].double() for vector in vectors]).sum(0).float() for name in vectors[0]}


def with_adapter(start: Weights, adapter: Any) -> dict[str, Tensor]:
    """Weights of a start with what an adapter adds, in float64, rounded once to float32.

    Args:
        start: The weights that the adapter was trained on.
        adapter: The model wrapped by peft.
    """
    added = TaskVector.between(start, adapter)
    return {name: (tensor.double() + added[name].double()).float() if name in added else tensor for name, tensor in start.items()}
