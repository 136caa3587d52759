"""Opening the vectors named in a command: saved vectors, or tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lata_lightning.merging.vocabularies import Vocabulary, between_vocabularies
from lata_lightning.moments import Start
from lata_lightning.store.directories import holds_vector
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import Weights, narrowed
from lata_lightning.vectors.task_vector import TaskVector


def added_to(onto: Weights, vectors: Sequence[str], model: str | None) -> Weights:
    """Return the model that vectors are added to; from a checkpoint that holds several models, the one with the given name.

    Args:
        onto: The model or checkpoint.
        vectors: Saved vectors, or tuned models.
        model: Name of a model in a checkpoint that holds several; None if there is only one.

    Raises:
        UnknownModelError: Neither it nor a tuned model holds a model of that name.
    """
    return narrowed([onto, *(path for path in vectors if not holds_vector(path))], model)[0]


def open_vector(
    path: str,
    onto: Weights,
    *,
    start: Start | None = None,
    vocabulary: Vocabulary | None = None,
    check_config: bool = True,
    leave_out: Sequence[str] = (),
    model: str | None = None,
) -> tuple[TaskVector, Weights | None]:
    """Open a saved vector, or the difference of a tuned model to the model that vectors are added to.

    Args:
        path: A saved vector, or any model.
        onto: The model that is subtracted from a tuned model.
        start: The kind of model that the fine-tune started from; by default as the vector's manifest says, and instruct for a tuned model.
        vocabulary: How the merge treats different vocabularies; the difference is then taken over the shared rows.
        check_config: As for ``TaskVector.between``.
        leave_out: As for ``TaskVector.between``, but a pattern may match nothing, as it may be for another vector.
        model: Name of a model in a checkpoint that holds several.

    Returns:
        The vector, and the tuned model it was computed from (None for a saved vector).

    Raises:
        SourceError, CorruptFileError, LayoutMismatchError: As for ``TaskVector.open`` and ``TaskVector.between``.
    """
    left_out, tuned = LeaveOut(leave_out), None
    settings: dict[str, Any] = {"start_kind": start or "instruct", "check_config": check_config, "leave_out": left_out}
    if holds_vector(path):
        vector = TaskVector.open(path, check_config=check_config).leaving_out(left_out)
    else:
        before, tuned = narrowed([onto, path], model)
        if vocabulary is None:
            vector = TaskVector.between(before, tuned, **settings)
        else:
            # The merge reports what happens to the rows, because it knows all vectors.
            vector, _ = between_vocabularies(before, tuned, "start", **settings)
    return vector if start is None else TaskVector(vector.tensors, replace(vector.manifest, start=start)), tuned
