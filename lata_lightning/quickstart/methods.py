"""The methods in the quickstart's tables: ways to weight the same task vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lata_lightning.alignment import Alignment
from lata_lightning.merging.weigh import weigh
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import Rule, Weighting, linear_drop_by_rank

Treatment = Callable[[TaskVector], TaskVector]


def _rule(weighting: Weighting | Rule) -> Treatment:
    return lambda vector: weigh(vector, weighting)


def _blocks_only(vector: TaskVector) -> TaskVector:
    return vector.with_coefficients(dict.fromkeys(vector.layers.layers(), 1.0), outside=0.0, weighting="none")


def ranks_reversed(alignment: Alignment) -> dict[str, float]:
    """Return the coefficients of the linear rule with reversed ranks: the best aligned layer gets the largest one."""
    return linear_drop_by_rank({layer: -value for layer, value in alignment.values.items()})


TASK_ARITHMETIC = "task arithmetic"
TREATMENTS: Mapping[str, Treatment] = {
    TASK_ARITHMETIC: TaskVector.unweighted,
    "LATA linear": _rule("linear"),
    "LATA log": _rule("log"),
    "LATA threshold": _rule("threshold"),
    # Controls: the effect of leaving out the tensors outside the blocks, and whether the order of the ranks matters.
    "control: blocks only": _blocks_only,
    "control: ranks reversed": _rule(ranks_reversed),
}
WITHOUT_SAMPLES = "lata regress, no samples"
"""Only for merges, as it needs several vectors."""
REGRESSION = "lata regress"
"""Only for merges, as it needs several vectors and samples of their tasks."""
LATA_METHODS: dict[str, Weighting] = {"LATA linear": "linear", "LATA log": "log", "LATA threshold": "threshold"}
