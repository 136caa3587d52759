"""Whether anything that was measured during training, or of the vectors alone, predicts what the merge of two experts loses.

Every pair of experts is merged by plain task arithmetic, at scale 1 and at the best scale of the grid, and by regression without samples. What
is lost is 1 minus the share of the experts' gain that is kept. The correlation is Spearman's over the pairs of one seed, averaged over the
seeds; its interval comes of drawing the experts anew with replacement, as pairs that share an expert are not independent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from lata_lightning.evaluation.scales import best_scale
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.matrix_merges import INTERFERENCE
from lata_lightning.moments import total
from lata_lightning.vectors.aligning import measure
from lata_lightning.vectors.task_vector import TaskVector
from study.cells import TASK_ARITHMETIC
from study.real.merging import Benches, Experts, built
from study.real.record import Record
from study.real.rows import summed
from study.real.scoring import HeldOut, losses
from study.real.tuning import FineTunes, Run

WITHOUT_SAMPLES = "lata regress without samples"
LOST = (f"{TASK_ARITHMETIC}, best scale", f"{TASK_ARITHMETIC}, scale 1", WITHOUT_SAMPLES)
RESAMPLED = 1000
FEWEST_PAIRS = 4
FEWEST_DRAWN = 3
"""With fewer pairs, and with fewer different ones in a draw, no correlation is computed."""


class Correlation(NamedTuple):
    """A rank correlation, and the ends of its 95 % interval; None where too few draws have enough pairs."""

    value: float
    low: float | None
    high: float | None


def run(models: FineTunes, held_out: HeldOut, record: Record, benches: Benches) -> dict[str, Any]:
    """Return what was seen in training and what merging loses, for every pair of experts, as plain types for JSON.

    Args:
        models: The fine-tunes of the seed; what is missing is trained.
        held_out: Scores models.
        record: Of what has been computed for this seed; new values are added.
        benches: Models in memory.
    """
    began = time.perf_counter()
    kinds = {}
    for kind, adapters in (("full", False), ("LoRA", True)):
        experts = Experts(models, held_out, "base", models.configuration.pairs, adapters, record, benches)
        kinds[kind] = {
            "experts": {name: seen(run) for name, run in experts.runs.items()},
            "pairs": {f"{one}, {other}": _pair(experts, one, other) for one, other in combinations(experts.names, 2)},
        }
        models.note(f"seed {models.seed}: {len(kinds[kind]['pairs'])} pairs of experts ({kind}) compared")
    return {
        "part": "prediction",
        "seed": models.seed,
        "model": models.configuration.model,
        "kinds": kinds,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


def seen(run: Run) -> dict[str, Any]:
    """Return what the callback saw of one fine-tune.

    Returns:
        ``history``, the measurements; and of the last one ``alignment`` and ``relative norm`` of the whole model, ``spread`` of the alignments,
        and ``growth``: the share of its final norm that the vector had after half of the measurements.
    """
    history = run.history
    last, middle = history[-1], history[len(history) // 2 - 1] if len(history) > 1 else history[-1]
    return {
        "alignment": last.get("alignment"),
        "relative norm": last.get("relative_norm"),
        "spread": last.get("alignment_spread"),
        "growth": middle["task_norm"] / last["task_norm"],
        "history": history,
    }


def predictors(of_pair: Mapping[str, float], experts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what may predict the loss of one pair.

    Args:
        of_pair: What lies between the two vectors: ``cosine`` and ``interference``.
        experts: What was seen of the two fine-tunes, of which means and the ratio of the norms are taken.
    """
    measures = ("alignment", "relative norm", "spread", "growth")
    known = {name: [each[name] for each in experts if each[name] is not None] for name in measures}
    found = {name: fmean(values) for name, values in known.items() if len(values) == len(experts)}
    norms = sorted(each["history"][-1]["task_norm"] for each in experts)
    return {**found, "ratio of norms": norms[0] / norms[-1], "cosine": of_pair["cosine"], "interference": of_pair["interference"]}


def correlations(results: Sequence[Mapping[str, Any]], kind: str) -> dict[str, dict[str, Correlation]]:
    """Return by what is lost, then by predictor, the rank correlation over the pairs; empty with too few pairs.

    A predictor that is the same for all pairs has none.

    Args:
        results: What ``run`` returns, one for each seed.
        kind: ``full`` or ``LoRA``.
    """
    tables = [result["kinds"][kind] for result in results]
    pairs = [tuple(pair.split(", ")) for pair in tables[0]["pairs"]] if tables else []
    if len(pairs) < FEWEST_PAIRS:
        return {}
    seeds, columns = [], list(LOST)
    for table in tables:
        rows = []
        for (one, other), figures in zip(pairs, table["pairs"].values(), strict=True):
            known = predictors(figures, [table["experts"][one], table["experts"][other]])
            columns = [*LOST, *known]
            rows.append([*(figures["lost"][lost] for lost in LOST), *known.values()])
        seeds.append(np.array(rows))
    measured = _ranked(seeds, np.arange(len(pairs)))
    drawn = np.array([_ranked(seeds, rows) for rows in _draws(list(tables[0]["experts"]), pairs)])
    return {
        lost: {
            name: Correlation(float(measured[row, column]), *_interval(drawn[:, row, column]))
            for column, name in enumerate(columns)
            if column >= len(LOST) and np.isfinite(measured[row, column])
        }
        for row, lost in enumerate(LOST)
    }


def _ranked(seeds: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return the rank correlations of all columns with what is lost, averaged over the seeds; NaN where a column is constant."""
    found = []
    for values in seeds:
        ranks = rankdata(values[rows], axis=0)
        centred = ranks - ranks.mean(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = centred / np.sqrt((centred**2).sum(axis=0))
        found.append(unit[:, : len(LOST)].T @ unit)
    return np.mean(found, axis=0)


def _draws(names: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> Iterator[np.ndarray]:
    """Yield the numbers of the pairs among experts that are drawn with replacement, where they make enough pairs.

    A pair comes as often as its experts were drawn together; an expert is no pair with itself.
    """
    numbers = {pair: number for number, one in enumerate(pairs) for pair in (one, one[::-1])}
    draw = random.Random(0)
    for _ in range(RESAMPLED):
        sample = draw.choices(names, k=len(names))
        found = [numbers[pair] for pair in combinations(sample, 2) if pair in numbers]
        if len(set(found)) >= FEWEST_DRAWN:
            yield np.array(found)


def _interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    """Return the ends of the 95 % interval; None where too few draws have a correlation."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < RESAMPLED / 2:
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _pair(experts: Experts, one: str, other: str) -> dict[str, Any]:
    vectors = [experts.runs[name].vector() for name in (one, other)]
    digest = " ".join(experts.runs[name].digest[:12] for name in (one, other))
    record = experts.record

    def lost(method: str, build: Callable[[], TaskVector], scales: Sequence[float]) -> tuple[dict[str, float], Any]:
        with built(experts.models.folder / "scratch", build, experts.models.seed) as vector:
            curve = {scale: _kept(experts, (one, other), vector, scale, "validation", f"{digest} {method}") for scale in scales}
            chosen = {"best": best_scale(curve), "1": 1.0}
            tested = {key: 1 - _kept(experts, (one, other), vector, scale, "test", f"{digest} {method}") for key, scale in chosen.items()}
            interference = record(f"pair {digest} {method} interference", lambda: _interference(vector()))
        return tested, interference

    plain, _ = lost(TASK_ARITHMETIC, lambda: summed(vectors), experts.models.configuration.scales)
    regressed, interference = lost(WITHOUT_SAMPLES, lambda: merge_matrices(vectors, "regression", check_base=False), (1.0,))
    return {
        "lost": dict(zip(LOST, (plain["best"], plain["1"], regressed["1"]), strict=True)),
        "cosine": record(f"pair {digest} cosine", lambda: cosine(*vectors)),
        "interference": interference,
    }


def cosine(one: TaskVector, other: TaskVector) -> float:
    """Return the cosine of two vectors over the whole model; 0 where one of them is zero."""
    sums = total(measure(one, other).values())
    norms = sums.task_norm * sums.instruction_norm
    return sums.inner / norms if norms else 0.0


def _interference(vector: TaskVector) -> float | None:
    """Return what the merge measured of the interference of its vectors, on average over blocks and vectors; None if nothing was measured."""
    derivation = vector.manifest.derivation
    measured = [] if derivation is None else [entry.layers.values() for entry in derivation.measured if entry.name == INTERFERENCE]
    values = [value for layers in measured for value in layers if value is not None]
    return fmean(values) if values else None


def _kept(experts: Experts, names: tuple[str, str], vector: Any, scale: float, split: Any, key: str) -> float:
    gains = experts.gains(split)

    def score() -> float:
        model = experts.bench(experts.start).plus(vector(), scale)
        kept = gains.kept({**gains.before, **losses(experts.held_out, model, names, split)})
        return fmean(kept[name] for name in names)

    value: float = experts.record(f"pair {key} {split} {scale:g}", score)
    return value
