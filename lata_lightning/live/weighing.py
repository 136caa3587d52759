"""The coefficients of a vector that was measured while it was trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lata_lightning.errors import LataError
from lata_lightning.merging.weigh import weigh
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import Rule, Weighting

DEFAULT_RULE: Weighting = "linear"
"""What coefficients are stored if no rule is asked for."""


def weigh_run(
    vector: TaskVector, weighting: Weighting | Rule | None, instruction: TaskVector | None, *, threshold: float, outside: float
) -> tuple[TaskVector, TaskVector]:
    """Give the vector of a run its coefficients, which never ends the run: what was trained is saved also where a rule fails.

    Args:
        vector: With the alignment that was measured, if any was.
        weighting: The rule that was asked for, if any was.
        instruction: What the alignment was measured with.
        threshold: For the rule ``"threshold"``.
        outside: Coefficient of the tensors that belong to no layer.

    Returns:
        The vector with the coefficients to store, and with those to apply in exports: 1 for every tensor where nobody asked for a rule and the
        alignments are too flat to rank by, or where the rule failed.
    """
    alignment = vector.manifest.alignment
    if alignment is None:
        return vector, vector
    settings: dict[str, Any] = {"alignment": alignment, "threshold": threshold, "outside": outside}
    plain = weigh(vector, "none", instruction, **settings)
    try:
        weighted = weigh(vector, weighting or DEFAULT_RULE, instruction, **settings)
    except Exception as error:  # A rule of one's own may raise anything.
        warnings.warn(f"the vector is exported without coefficients: {str(error) or repr(error)}", stacklevel=2)
        return vector, plain
    return weighted, plain if weighting is None and alignment.flat else weighted


def open_instruction(given: tuple[str, str] | str | Path | TaskVector | None) -> TaskVector | None:
    """Return the instruction vector that is meant by a saved one, by a pair (base, instruct) of models, or by the vector itself.

    Raises:
        LataError: It is none of these.
    """
    if given is None or isinstance(given, TaskVector):
        return given
    if isinstance(given, str | Path):
        return TaskVector.open(given)
    if len(given) != 2:
        raise LataError(f"instruction_vector must be a saved vector or a pair (base, instruct), got {given!r}")
    return TaskVector.between(given[0], given[1], kind="instruction")
