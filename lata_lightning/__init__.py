"""Layer-Aware Task Arithmetic for PyTorch Lightning.

Names are imported when they are first used, so that ``import lata_lightning`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lata_lightning.alignment import Alignment
    from lata_lightning.callbacks.attention_only import AttentionOnlyFinetuning
    from lata_lightning.callbacks.lata import LATACallback
    from lata_lightning.errors import LataError
    from lata_lightning.layers import LayerMap, layer_map
    from lata_lightning.linearity.regression import regress
    from lata_lightning.linearity.solving import solve_coefficients
    from lata_lightning.live.monitor import TaskVectorMonitor
    from lata_lightning.merging.merge import Term, forget, merge
    from lata_lightning.vectors.aligning import align
    from lata_lightning.vectors.metric import LayerAlignment
    from lata_lightning.vectors.projection import project
    from lata_lightning.vectors.task_vector import TaskVector
    from lata_lightning.weighting import drop_with_threshold, linear_drop_by_rank, log_drop_by_rank

_HOMES = {
    "Alignment": "alignment",
    "AttentionOnlyFinetuning": "callbacks.attention_only",
    "LATACallback": "callbacks.lata",
    "LataError": "errors",
    "LayerAlignment": "vectors.metric",
    "LayerMap": "layers",
    "TaskVector": "vectors.task_vector",
    "TaskVectorMonitor": "live.monitor",
    "Term": "merging.merge",
    "align": "vectors.aligning",
    "drop_with_threshold": "weighting",
    "forget": "merging.merge",
    "layer_map": "layers",
    "linear_drop_by_rank": "weighting",
    "log_drop_by_rank": "weighting",
    "merge": "merging.merge",
    "project": "vectors.projection",
    "regress": "linearity.regression",
    "solve_coefficients": "linearity.solving",
}

__all__ = [
    "Alignment",
    "AttentionOnlyFinetuning",
    "LATACallback",
    "LataError",
    "LayerAlignment",
    "LayerMap",
    "TaskVector",
    "TaskVectorMonitor",
    "Term",
    "align",
    "drop_with_threshold",
    "forget",
    "layer_map",
    "linear_drop_by_rank",
    "log_drop_by_rank",
    "merge",
    "project",
    "regress",
    "solve_coefficients",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
