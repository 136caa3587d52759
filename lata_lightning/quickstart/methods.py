"""The rows of the quickstart's tables: ways to weight one and the same task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import Weighting, linear_drop_by_rank

Method = Callable[[TaskVector], TaskVector]


def _rule(weighting: Weighting) -> Method:
    return lambda vector: vector.weighted(_measured(vector), weighting)


def _blocks_only(vector: TaskVector) -> TaskVector:
    uniform = vector.weighted(_measured(vector), "none")
    return TaskVector(uniform.tensors, replace(uniform.manifest, outside=0.0))


def _reversed_ranks(vector: TaskVector) -> TaskVector:
    alignment = _measured(vector)
    turned = linear_drop_by_rank({layer: -value for layer, value in alignment.values.items()})
    weighted = vector.weighted(alignment, "linear")
    return TaskVector(weighted.tensors, replace(weighted.manifest, coefficients=turned))


def _measured(vector: TaskVector) -> Alignment:
    if vector.manifest.alignment is None:
        raise LataError(f"{vector.label} holds no alignment to weight it by")
    return vector.manifest.alignment


TASK_ARITHMETIC = "task arithmetic"
METHODS: Mapping[str, Method] = {
    TASK_ARITHMETIC: TaskVector.unweighted,
    "LATA linear": _rule("linear"),
    "LATA log": _rule("log"),
    "LATA threshold": _rule("threshold"),
    # Controls: what leaving out the tensors outside the blocks does by itself, and whether the order of the ranks matters.
    "control: blocks only": _blocks_only,
    "control: ranks reversed": _reversed_ranks,
}
REGRESSION = "lata regress"
"""For merges only: it needs several vectors, and samples of their tasks."""
LATA_METHODS: dict[str, Weighting] = {"LATA linear": "linear", "LATA log": "log", "LATA threshold": "threshold"}
