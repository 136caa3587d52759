"""The start model that samples run through, and the vectors that move its weights, under the names of the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import LayerMap
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.store.meta_model import copy_without_weights, model_without_weights
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import View
from lata_lightning.vectors.aligning import check_same_model, check_same_start
from lata_lightning.vectors.matched import MatchedVectors, match_vectors
from lata_lightning.vectors.task_vector import TaskVector

StartModel = str | os.PathLike[str] | nn.Module


@dataclass(frozen=True)
class OpenedStart:
    """A start model without weights, its floating weights, and vectors.

    Attributes:
        model: The model.
        weights: Its weights, under the names under which transformers saves the model.
        vectors: The vectors under the same names, each with zeros for tensors that it lacks.
        layers: Position of every tensor, under the same names.
        matched: Weights and vectors under the names that the start has on disk.
        stored: Name on disk by the name under which transformers saves the model.
    """

    model: ModelWeights
    weights: TensorSource
    vectors: Sequence[TensorSource]
    layers: LayerMap
    matched: MatchedVectors
    stored: dict[str, str]


def open_start(start: StartModel, vectors: Sequence[TaskVector], *, check_base: bool = True) -> OpenedStart:
    """Open a start model and vectors under one set of names, without reading tensors.

    Args:
        start: Directory or hub id of a transformers model, or a module (which is not changed).
        vectors: Task vectors from this start. A vector may lack what was left out of it; it is zero there.
        check_base: Refuse vectors that are known to start from different weights.

    Raises:
        SourceError: The start cannot be read, or does not say which model it is.
        LayoutMismatchError: The tensors of a vector are not those of the model, or its model has other tokens or computes another function.
        BaseMismatchError: Two vectors start from different weights.
        LataError: There is no vector, or one started from base.
    """
    if not vectors:
        raise LataError("there is nothing to measure: give at least one vector")
    from_base = [vector.label for vector in vectors if vector.start == "base"]
    if from_base:
        raise LataError(
            f"a module is compared with itself in the start model, so vectors must start from instruct; from base started {first_three(from_base)}. "
            "Give the tuned models in their place, take the instruction vector off first (without(instruction_vector)), or extract them as "
            "tuned − instruct."
        )
    if check_base:
        check_same_start(vectors)
    source = open_source(Path(start) if isinstance(start, os.PathLike) else start)
    model = ModelWeights(
        copy_without_weights(start) if isinstance(start, nn.Module) else model_without_weights(source.config, source.label)
    )
    matched = match_vectors(source, vectors)
    check_same_model(source, vectors)
    stored = model.names_of(matched.onto)
    layers = matched.layers
    return OpenedStart(
        model,
        View(matched.onto, stored),
        [View(reader, stored) for reader in matched.readers],
        LayerMap({name: layers.positions[other] for name, other in stored.items()}, layers.blocks),
        matched,
        stored,
    )
