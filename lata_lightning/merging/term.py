"""The terms of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lata_lightning.alignment import RANKING
from lata_lightning.errors import LataError
from lata_lightning.merging.weigh import check_asked_for
from lata_lightning.store.sources import TensorSource
from lata_lightning.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Term:
    """One term of a merge: a vector and its scale.

    Attributes:
        vector: A task vector; its coefficients, if any, weight its layers. Coefficients from a file are refused if the alignments behind them are too flat
            to rank layers by. Choose explicitly in that case, with ``unweighted()``, ``weighted(…)`` or ``lata_lightning.merging.weigh.weigh``.
        scale: Multiplier of the whole vector, dimensionless; any finite number.
        tuned: The tuned model itself, if available: a merge over different vocabularies compares its tokens and takes new rows from it.
    """

    vector: TaskVector
    scale: float = 1.0
    tuned: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise LataError(f"the scale of {self.vector.label} must be a finite number, got {self.scale}")
        if self.vector.start == "base" and self.vector.manifest.coefficients is not None:
            raise LataError(
                f"{self.vector.label} started from base, so its coefficients belong to what remains after the instruction vector is taken off: "
                "give the instruction vector too (without(instruction_vector))"
            )
        check_asked_for(self.vector)

    def factor(self, name: str) -> float:
        """Return scale · coefficient for a tensor; 0 where the vector is known to be zero.

        Buffers are not scaled: the factor is 1 under a positive scale and 0 otherwise, because subtracting a vector does not change the statistics of a
        model.
        """
        if name in self.vector.unchanged:
            return 0.0
        if name in self.vector.layers.statistics:
            return float(self.scale > 0)
        return self.scale * self.vector.coefficient_of(name)

    def record(self) -> dict[str, Any]:
        """Return the entry of this term in the merge record."""
        manifest = self.vector.manifest
        return {
            "vector": self.vector.label,
            "kind": manifest.kind,
            "start": {"kind": manifest.start, **asdict(manifest.start_identity)},
            "tuned": asdict(manifest.tuned_identity),
            "scale": self.scale,
            "weighting": manifest.weighting,
            "threshold": manifest.threshold if manifest.weighting == "threshold" else None,
            "level": manifest.level,
            "outside": 1.0 if manifest.coefficients is None else manifest.outside,
            "coefficients": None if manifest.coefficients is None else dict(manifest.coefficients),
            "weighting_asked_for": manifest.asked_for,
            **(dict.fromkeys(RANKING) if manifest.alignment is None else manifest.alignment.ranking()),
            **({"leave_out": list(manifest.leave_out)} if manifest.leave_out else {}),
        }
