"""One setting: every row at every scale by validation, then once on test at the best scale and once at scale 1.

The score is the share of the experts' own gain in held-out loss that is kept, averaged over the experts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lata_lightning.evaluation.scales import best_scale
from lata_lightning.merging.term import Term
from lata_lightning.rows.inputs import model_inputs, tokenised
from lata_lightning.vectors.task_vector import TaskVector
from study.cells import TASK_ARITHMETIC
from study.real.configuration import Protocol, Setting
from study.real.record import Record
from study.real.rows import Merge, Row, Samples, rows_for
from study.real.scoring import Bench, Gains, HeldOut, Split, details, losses
from study.real.tuning import FineTunes

UNTUNED = 1.0
_ROWS_PER_BATCH = 8


class Experts:
    """The experts of some data sets under one protocol, and what they gain.

    Args:
        models: The fine-tunes of the seed.
        held_out: Scores models.
        protocol: What the experts are tuned from.
        names: Their data sets.
        adapters: Whether they are LoRA adapters.
        record: Of what has been scored.
        bench: Returns a bench for a model directory.
    """

    def __init__(
        self, models: FineTunes, held_out: HeldOut, protocol: Protocol, names: Sequence[str], adapters: bool, record: Record, bench: Benches
    ) -> None:
        self.models, self.held_out, self.protocol, self.names, self.adapters = models, held_out, protocol, tuple(names), adapters
        self.record, self.bench = record, bench
        self.runs = {name: models.expert(name, protocol, adapters=adapters) for name in self.names}
        self.start = models.start(protocol)
        self._key = f"{'lora ' if adapters else ''}{{}} from {'instruct' if protocol == 'instruct' else 'model'}"

    @cached_property
    def vectors(self) -> dict[str, TaskVector]:
        """Expert − start, by data set."""
        return {name: run.vector("base" if self.protocol == "base" else "instruct") for name, run in self.runs.items()}

    def reference(self, name: str | None) -> dict[str, dict[str, float | None]]:
        """Return the test scores of an expert on its own and all other data sets, or of the start for None."""
        key = f"test of {'start' if name is None else self._key.format(name)} {self._digest(name)} on {' '.join(self.names)}"
        found: dict[str, dict[str, float | None]] = self.record(key, lambda: details(self.held_out, self._model(name), self.names))
        return found

    def gains(self, split: Split) -> Gains:
        """Return what the experts gain on a split."""

        def loss(name: str, expert: str | None) -> float:
            key = f"{split} loss on {name} of {'start' if expert is None else self._key.format(expert)} {self._digest(expert)}"
            value: float = self.record(key, lambda: self.held_out(self._model(expert), name, split).loss)
            return value

        return Gains({name: loss(name, None) for name in self.names}, {name: loss(name, name) for name in self.names})

    def merge(self, trials: int, names: Sequence[str] | None = None) -> Merge:
        """Return what the rows are built from, for all experts or some of them."""
        wanted = self.names if names is None else tuple(names)
        plain = self.protocol == "plain"
        onto = self.start if plain else self.models.instruct

        def score(vectors: Sequence[TaskVector]) -> float:
            model = self.bench(onto).at([Term(vector) for vector in vectors])
            gains = self.gains("validation")
            kept = gains.kept({**gains.before, **losses(self.held_out, model, wanted, "validation")})
            return fmean(kept[name] for name in wanted)

        return Merge(
            self.protocol,
            self.models.seed,
            self.start,
            onto,
            [self.vectors[name] for name in wanted],
            None if plain else self.models.instruction,
            lambda: self._samples(wanted),
            score,
            trials,
        )

    def _samples(self, names: Sequence[str]) -> Samples:
        """Return some training rows of each expert as inputs of the model."""
        count, length = self.models.configuration.calibration_rows, self.models.configuration.context_length
        found = []
        for name in names:
            rows, _ = tokenised(self.models.rows(name).train[:count], self.models.tokenizer, max_tokens=length, name=name)
            found.append(model_inputs(rows, _ROWS_PER_BATCH))
        return found

    def _model(self, expert: str | None) -> Any:
        return self.bench(self.start).at(
            [] if expert is None else [Term(self.models.expert(expert, self.protocol, adapters=self.adapters).vector())]
        )

    def _digest(self, expert: str | None) -> str:
        run = next(iter(self.runs.values())) if expert is None else self.runs[expert]
        return run.digest[:12]


class Benches:
    """Benches by model directory, of which only the last one is in memory."""

    def __init__(self) -> None:
        self._last: Bench | None = None

    def __call__(self, onto: Path) -> Bench:
        """Return the bench of a model."""
        if self._last is None or self._last.onto != onto:
            self._last = None
            self._last = Bench(onto)
        return self._last


def run(
    models: FineTunes, held_out: HeldOut, setting: Setting, record: Record, benches: Benches, methods: Collection[str] | None = None
) -> dict[str, Any]:
    """Return everything about one setting, as plain types for JSON.

    Args:
        models: The fine-tunes of the seed; what is missing is trained.
        held_out: Scores models.
        setting: What is merged.
        record: Of what has been computed for this seed; new values are added.
        benches: Models in memory.
        methods: Names of rows; all rows of the protocol unless given.

    Raises:
        LataError: An expert is no better on its own data set than what it was tuned from.
    """
    began = time.perf_counter()
    experts = Experts(models, held_out, setting.protocol, setting.experts, setting.adapters, record, benches)
    merge = experts.merge(models.configuration.few_shot_trials)
    gains = {split: experts.gains(split) for split in ("validation", "test")}
    # What comes of other fine-tunes must not be taken for what comes of these.
    digest = "".join(run.digest[:8] for run in experts.runs.values())
    found = {}
    for name, row in rows_for(setting.protocol).items():
        if methods is None or name in methods:
            judge = _Judge(experts, merge, row, f"{setting.name} {digest} {name}", record, models.configuration.scales)
            found[name] = judge(gains["validation"], gains["test"])
            models.note(
                f"seed {models.seed}: {setting.name}: {name} keeps {100 * found[name]['test']:.1f} % at scale {found[name]['scale']:g}"
            )
    return {
        "part": "merging",
        "seed": models.seed,
        "model": models.configuration.model,
        "setting": {"protocol": setting.protocol, "adapters": setting.adapters, "experts": list(setting.experts)},
        "scales": [0.0, *models.configuration.scales],
        "reference": {"start": experts.reference(None), "experts": {name: experts.reference(name) for name in setting.experts}},
        "methods": found,
        "headroom": fmean(found[TASK_ARITHMETIC]["test_kept"].values()) if TASK_ARITHMETIC in found else None,
        "spread": [alignment.spread for alignment in merge.alignments],
        "alignment": [alignment.values for alignment in merge.alignments],
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


class _Judge:
    """Scores one row: its curve, then test at the best scale and at scale 1."""

    def __init__(self, experts: Experts, merge: Merge, row: Row, key: str, record: Record, scales: Sequence[float]) -> None:
        self._experts, self._merge, self._row, self._key, self._record, self._scales = experts, merge, row, key, record, scales

    def __call__(self, validation: Gains, test: Gains) -> dict[str, Any]:
        names = self._experts.names
        with built(self._experts.models.folder / "scratch", lambda: self._row.build(self._merge), self._merge.seed) as vector:
            curve = {scale: self._validated(vector, scale, validation) for scale in (0.0, *self._scales)}
            scale = best_scale(curve)
            tested = {each: self._tested(vector, each) for each in dict.fromkeys((scale, UNTUNED))}
        kept = {each: test.kept({name: scores[name]["loss"] for name in names}) for each, scores in tested.items()}
        return {
            "kind": self._row.kind,
            "onto": self._row.onto,
            "tuned": self._row.tuned,
            "validation": {f"{each:g}": score for each, score in curve.items()},
            "scale": scale,
            "test": fmean(kept[scale].values()),
            "test_kept": kept[scale],
            "test_details": tested[scale],
            "untuned": fmean(kept[UNTUNED].values()),
            "untuned_details": tested[UNTUNED],
        }

    def _validated(self, vector: Lazy, scale: float, gains: Gains) -> float:
        def score() -> float:
            model = self._bench.plus(vector(), scale) if scale else self._bench.at([])
            return gains.score(losses(self._experts.held_out, model, self._experts.names, "validation"))

        # Without a vector all rows that go onto one model are the same.
        of = self._key if scale else f"{self._key.removesuffix(self._row.name)}{self._row.model(self._merge).name}"
        value: float = self._record(f"{of} validation {scale:g}", score)
        return value

    def _tested(self, vector: Lazy, scale: float) -> dict[str, Any]:
        def scores() -> dict[str, Any]:
            model = self._bench.plus(vector(), scale) if scale else self._bench.at([])
            return details(self._experts.held_out, model, self._experts.names)

        found: dict[str, Any] = self._record(f"{self._key} test {scale:g}", scores)
        return found

    @property
    def _bench(self) -> Bench:
        return self._experts.bench(self._row.model(self._merge))


class Lazy:
    """A vector that is built and written to a folder when it is first asked for."""

    def __init__(self, folder: Path, build: Callable[[], TaskVector], seed: int) -> None:
        self._folder, self._build, self._seed = folder, build, seed

    @cached_property
    def _saved(self) -> TaskVector:
        shutil.rmtree(self._folder, ignore_errors=True)
        # Whatever draws from torch's own generator starts alike in every run.
        torch.manual_seed(self._seed)
        return self._build().save(self._folder)

    def __call__(self) -> TaskVector:
        """Return the vector, opened from the folder."""
        return self._saved


@contextmanager
def built(folder: Path, build: Callable[[], TaskVector], seed: int) -> Iterator[Lazy]:
    """Give a vector that is built when it is needed, and remove its files at the end.

    Args:
        folder: Where it is written.
        build: Returns the vector.
        seed: Of torch's generator while it is built.
    """
    try:
        yield Lazy(folder, build, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
