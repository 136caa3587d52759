"""Learning one data set after the other: fine-tuning on, with and without replay, and merging of the experts that were tuned from the same start.

Scores are shares of each expert's own gain on its data set: 0 for the start, 1 for the expert alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lata_lightning.evaluation.continual import summary
from lata_lightning.evaluation.scales import best_scale
from lata_lightning.rows.schema import Sample
from study.cells import TASK_ARITHMETIC
from study.real.merging import Benches, Experts, built
from study.real.record import Record
from study.real.rows import RANDOM_ROWS, largest, rows_for, summed
from study.real.scoring import INSTRUCTIONS, Gains, HeldOut, Split, losses
from study.real.tuning import FineTunes, Run

MERGES = (
    TASK_ARITHMETIC,
    "LATA linear, block",
    "LATA log, block",
    *(f"random linear {number}" for number in range(1, RANDOM_ROWS + 1)),
    "TSV-M",
    "lata regress without samples",
    "lata regress",
)
SEQUENTIAL, REPLAY, MAGMAX = "sequential fine-tuning", "sequential fine-tuning with replay", "MagMax"


def run(models: FineTunes, held_out: HeldOut, record: Record, benches: Benches) -> dict[str, Any]:
    """Return every way of learning the sequence, as plain types for JSON.

    Args:
        models: The fine-tunes of the seed; what is missing is trained.
        held_out: Scores models.
        record: Of what has been computed for this seed; new values are added.
        benches: Models in memory.
    """
    began = time.perf_counter()
    learning = _Learning(models, held_out, record, benches)
    found: dict[str, Any] = {}
    sequential = learning.in_sequence(replay=False)
    learned = [run.vector() for run in sequential]
    totals = [summed(learned[:stage]) for stage in range(1, len(learned) + 1)]
    found[SEQUENTIAL] = learning.trained(SEQUENTIAL, sequential)
    found[REPLAY] = learning.trained(REPLAY, learning.in_sequence(replay=True))
    found[MAGMAX] = learning.merged(MAGMAX, "method", lambda stage: largest(totals[:stage]), sequential)
    for name in MERGES:
        row = rows_for("instruct")[name]
        found[name] = learning.merged(name, row.kind, lambda stage, row=row: row.build(learning.experts.merge(0, learning.names[:stage])))
        models.note(f"seed {models.seed}: continual: {name}, {100 * found[name]['average_accuracy']:.1f} % after the last data set")
    return {
        "part": "continual",
        "seed": models.seed,
        "model": models.configuration.model,
        "tasks": list(learning.names),
        "alone": [1.0] * len(learning.names),
        "reference": [0.0] * len(learning.names),
        "methods": found,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


class _Learning:
    """The experts of the sequence, and the scores of models at every stage."""

    def __init__(self, models: FineTunes, held_out: HeldOut, record: Record, benches: Benches) -> None:
        self._models, self._held_out, self._record, self._benches = models, held_out, record, benches
        self.names = models.configuration.continual.experts
        self.experts = Experts(models, held_out, "instruct", self.names, False, record, benches)
        self._gains: dict[Split, Gains] = {"validation": self.experts.gains("validation"), "test": self.experts.gains("test")}
        self._digest = "".join(run.digest[:8] for run in self.experts.runs.values())

    def in_sequence(self, *, replay: bool) -> list[Run]:
        """Return the fine-tunes of every stage, each from the model after the one before."""
        runs: list[Run] = []
        start = self.experts.start
        for number, name in enumerate(self.names):
            # The first stage is the expert itself.
            run = self.experts.runs[name] if not number else self._stage(number, start, replay=replay)
            runs.append(run)
            before, name = start, f"after-{'replay' if replay else 'sequential'}-{number + 1}"
            if number + 1 < len(self.names):
                start = self._models.merged(name, before, run)
            if before != self.experts.start:
                # A model takes as much disk as its vector, and follows from the vectors.
                shutil.rmtree(before)
        return runs

    def trained(self, name: str, runs: Sequence[Run]) -> dict[str, Any]:
        """Return the scores of the models after every stage, for JSON."""
        key = f"{name} {' '.join(run.digest[:8] for run in runs)}"
        vectors = [run.vector() for run in runs]
        matrix, instruct = [], []
        for stage in range(1, len(runs) + 1):
            with built(self._models.folder / "scratch", lambda stage=stage: summed(vectors[:stage]), self._models.seed) as vector:
                found = self._tested(f"{key} {stage}", vector, 1.0)
            matrix.append(found["kept"])
            instruct.append(found["instruct"])
        return {"kind": "baseline", "matrix": matrix, "scales": None, **summary(matrix, [0.0] * len(runs)), "instruct": instruct}

    def merged(self, name: str, kind: str, build: Any, runs: Sequence[Run] = ()) -> dict[str, Any]:
        """Return the scores of the start plus scale · vector after every stage, for JSON; the scale is chosen on validation of what was learned so far.

        Args:
            name: Of the row.
            kind: Method, control or candidate.
            build: Returns the vector of a stage, from 1 on.
            runs: What the vectors come from, where that is not the experts.
        """
        key = f"{name} {self._digest} {' '.join(run.digest[:8] for run in runs)}"
        matrix, scales, instruct = [], [], []
        for stage in range(1, len(self.names) + 1):
            with built(self._models.folder / "scratch", lambda stage=stage: build(stage), self._models.seed) as vector:
                curve = {
                    scale: self._validated(f"{key} {stage}", vector, scale, stage) for scale in self._models.configuration.continual.scales
                }
                scales.append(best_scale(curve))
                found = self._tested(f"{key} {stage}", vector, scales[-1])
            matrix.append(found["kept"])
            instruct.append(found["instruct"])
        return {"kind": kind, "matrix": matrix, "scales": scales, **summary(matrix, [0.0] * len(self.names)), "instruct": instruct}

    def _stage(self, number: int, start: Path, *, replay: bool) -> Run:
        name = self.names[number]
        samples: list[Sample] = list(self._models.rows(name).train)
        if replay:
            memory = self._models.configuration.continual.replay
            earlier = [row for each in self.names[:number] for row in self._models.rows(each).train[:memory]]
            # Half of what is seen is new, whatever the number of earlier data sets.
            samples = samples[: max(1, len(earlier))] + earlier
        tuning = self._models.configuration.experts[name]
        return self._models.tuned(f"{name}-as-{number + 1}-{'replay' if replay else 'sequential'}", start, samples, tuning)

    def _validated(self, key: str, vector: Any, scale: float, stage: int) -> float:
        gains, seen = self._gains["validation"], self.names[:stage]

        def score() -> float:
            model = self._benches(self.experts.start).plus(vector(), scale)
            kept = gains.kept({**gains.before, **losses(self._held_out, model, seen, "validation")})
            return sum(kept[name] for name in seen) / stage

        value: float = self._record(f"continual validation {key} {scale:g}", score)
        return value

    def _tested(self, key: str, vector: Any, scale: float) -> dict[str, Any]:
        def scores() -> dict[str, Any]:
            model = self._benches(self.experts.start).plus(vector(), scale)
            kept = self._gains["test"].kept(losses(self._held_out, model, self.names, "test"))
            return {"kept": list(kept.values()), "instruct": self._held_out(model, INSTRUCTIONS, "test").loss}

        found: dict[str, Any] = self._record(f"continual test {key} {scale:g}", scores)
        return found
