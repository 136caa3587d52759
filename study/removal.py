"""Taking one expert off a merge of several by regression: what is left of its skill, and what is kept of the others.

The merge is start + R(τ₁ … τ_n) at scale 1. Who has the vectors can merge the others again, which is exact. Who has only the merged model and the vector
of the expert can subtract that vector, at the smallest scale that leaves a tenth of what the expert had gained, as validation says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.vectors.task_vector import TaskVector
from study import tasks
from study.cases import Weights, summed
from study.chain import Chain
from study.merging import Scoring
from study.settings import TASKS_OF, Setting

RESIDUAL = 0.1
"""Share of the expert's own gain that may be left."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SETTINGS = tuple(Setting(track, "instruct", names) for track, names in TASKS_OF.items())
WAYS = ("nothing taken off", "the others merged again", "the vector subtracted", "the vector subtracted from the sum")


def run(chain: Chain) -> dict[str, Any]:
    """Every way of taking off every expert of one seed.

    Returns:
        For JSON: ``settings``, by name a list with one entry for each expert taken off: by way its ``scale`` (null where none reaches the residual, or
        there is none to choose), what is ``left`` of its gain and what is ``kept`` of those of the others on test, and the instruct skills.
    """
    began = time.process_time()
    found = {setting.name: _setting(chain, setting) for setting in SETTINGS}
    return {"part": "removal", "seed": chain.seed, "settings": found, "cpu_minutes": (time.process_time() - began) / 60}


def _setting(chain: Chain, setting: Setting) -> list[dict[str, Any]]:
    start = chain.start(setting.protocol)
    experts = {task: chain.expert(task, setting.protocol) for task in setting.experts}
    splits: tuple[tasks.Split, ...] = ("validation", "test")
    before, own = (
        {split: {task: tasks.TASKS[task].score(chain.model(models[task]), split) for task in setting.experts} for split in splits}
        for models in (dict.fromkeys(experts, start), experts)
    )
    scoring = Scoring(setting, before, own)
    vectors = {task: TaskVector.between(start, expert) for task, expert in experts.items()}
    merged = _added(start, _regression(list(vectors.values())))
    total = _added(start, summed(list(vectors.values())))
    entries = []
    for taken, vector in vectors.items():
        again = _added(start, _regression([other for task, other in vectors.items() if task != taken]))
        ways = {
            WAYS[0]: (None, merged),
            WAYS[1]: (None, again),
            WAYS[2]: _subtracted(chain, scoring, merged, vector, taken),
            WAYS[3]: _subtracted(chain, scoring, total, vector, taken),
        }
        entries.append({"taken": taken, "ways": {way: _judged(chain, scoring, taken, *found) for way, found in ways.items()}})
    return entries


def _regression(vectors: Sequence[TaskVector]) -> Weights:
    return summed([merge_matrices(vectors, check_base=False)])


def _added(start: Weights, delta: Weights, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + scale * delta[name] for name, tensor in start.items()}


def _subtracted(chain: Chain, scoring: Scoring, merged: Weights, vector: Weights, taken: str) -> tuple[float | None, Weights | None]:
    """The smallest scale that leaves no more than the residual, and the model there; None where no scale does."""
    for scale in SCALES:
        weights = _added(merged, vector, -scale)
        if _kept(chain, scoring, weights, "validation")[taken] <= RESIDUAL:
            return scale, weights
    return None, None


def _judged(chain: Chain, scoring: Scoring, taken: str, scale: float | None, weights: Weights | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    kept = _kept(chain, scoring, weights, "test")
    others = fmean(share for task, share in kept.items() if task != taken)
    instruct = tasks.TASKS[tasks.INSTRUCT].score(chain.model(weights), "test")
    return {"scale": scale, "left": kept[taken], "kept": others, "instruct": instruct}


def _kept(chain: Chain, scoring: Scoring, weights: Weights, split: tasks.Split) -> Mapping[str, float]:
    model = chain.model(weights)
    return scoring.kept({task: tasks.TASKS[task].score(model, split) for task in scoring.setting.experts}, split)
