"""Opening what a command names as a vector: a saved one, or a tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.merging.vocabularies import Vocabulary, between_vocabularies
from lata_lightning.moments import Start
from lata_lightning.store.directories import holds_vector
from lata_lightning.store.names import LeaveOut
from lata_lightning.vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from lata_lightning.store.sources import Source


def open_vector(
    path: str,
    onto: str | Path | Source,
    *,
    start: Start | None = None,
    vocabulary: Vocabulary | None = None,
    check_config: bool = True,
    leave_out: Sequence[str] = (),
) -> tuple[TaskVector, str | None]:
    """Open a saved vector, or take the difference of a tuned model to the model that vectors are added to.

    Args:
        path: A saved vector, or any model.
        onto: The model that a tuned model is compared with.
        start: What the fine-tune started from; by default what the vector's manifest says, and instruct for a tuned model.
        vocabulary: How a merge treats different vocabularies; a tuned model then keeps the rows it shares with ``onto``.
        check_config: As for ``TaskVector.between``.
        leave_out: The same; a pattern may match nothing, as it may be meant for another vector.

    Returns:
        The vector, and the tuned model it was computed from (None for a saved vector).

    Raises:
        SourceError, CorruptFileError, LayoutMismatchError: As ``TaskVector.open`` and ``TaskVector.between``.
    """
    left_out = LeaveOut(leave_out)
    settings: dict[str, Any] = {"start_kind": start or "instruct", "check_config": check_config, "leave_out": left_out}
    if holds_vector(path):
        vector, tuned = TaskVector.open(path, check_config=check_config).leaving_out(left_out), None
    elif vocabulary is None:
        vector, tuned = TaskVector.between(onto, path, **settings), path
    else:
        # The merge says what became of the rows, as it knows all vectors.
        vector, tuned = between_vocabularies(onto, path, "start", **settings)[0], path
    return vector if start is None else TaskVector(vector.tensors, replace(vector.manifest, start=start)), tuned
