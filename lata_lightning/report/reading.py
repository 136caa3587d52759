"""Opening the inputs of a report: output of runs, saved vectors, merged models and scale curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lata_lightning.alignment import Alignment
from lata_lightning.errors import CorruptFileError, LataError, SourceError, first_three
from lata_lightning.live.history import COSINE, MeasuredStep, read_history
from lata_lightning.store.directories import MERGE_RECORD, SCORES_NAME, holds_vector, read_object
from lata_lightning.store.run_directory import HISTORY_NAME, VECTOR_NAME
from lata_lightning.vectors.task_vector import TaskVector

TUNE_NAME = "tune.json"
CALLBACK_FOLDER = "lata"


@dataclass(frozen=True)
class HistoryEntry:
    """One line of a history: the figures of the whole model, and of every layer."""

    step: int
    epoch: int | None
    task_norm: float
    alignment: float | None
    relative_norm: float | None
    layers: Alignment
    cosines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleCurves:
    """Scores by scale.

    Attributes:
        curves: Score by ascending scale, for each file and, where there are several, for each rule.
        metric: Name of the metric.
        chosen: The chosen point in words; empty where the file names none.
    """

    curves: Mapping[str, Mapping[float, float]]
    metric: str
    chosen: str


@dataclass(frozen=True)
class Subject:
    """One input of a report.

    Attributes:
        label: Short name, unique in the report.
        path: The path as given.
        history: The history of a run, oldest first.
        vector: The task vector.
        vector_path: Directory of the task vector.
        scales: The scale curves of the vector.
        terms: For a merged model, the entry of each vector in its merge record.
        onto: For a merged model, the model that the vectors were added to.
        scores: Scores by ``lata evaluate``, by data set and metric.
        intervals: Ends of the 95 % confidence interval of a score, by data set and metric, where there is one.
    """

    label: str
    path: str
    history: tuple[HistoryEntry, ...] = ()
    vector: TaskVector | None = None
    vector_path: Path | None = None
    scales: ScaleCurves | None = None
    terms: tuple[Mapping[str, Any], ...] = ()
    onto: str | None = None
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    intervals: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)


def open_subjects(paths: Sequence[str | Path]) -> list[Subject]:
    """Open what is at each path, without reading tensors.

    A path is the output directory of a run (``history.jsonl``, ``task_vector``, ``tune.json``, whichever of them are there), a saved vector, a
    ``tune.json``, a merged model, or a directory that ``lata evaluate --output`` wrote to.

    Raises:
        SourceError: A path holds none of them, or no measurement yet.
        CorruptFileError: A file cannot be parsed.
        LataError: A path is given twice.
    """
    twice = {str(path) for path in paths if [Path(other).resolve() for other in paths].count(Path(path).resolve()) > 1}
    if twice:
        raise LataError(f"each run or vector can be shown once; given more than once are {first_three(twice)}")
    labels = [_name(Path(path)) for path in paths]
    labels = [str(path) if labels.count(label) > 1 else label for path, label in zip(paths, labels, strict=True)]
    return [_open(Path(path), str(path), label) for path, label in zip(paths, labels, strict=True)]


def read_scales(path: Path) -> ScaleCurves:
    """Read scores by scale, from ``{"points": [{"scale": 0.5, "scores": {"math": 0.61}}]}``.

    A point may also have ``weighting``, its rule, and ``control``, its scores on control data; the file may have ``metric``, and ``best`` with the chosen
    scale and weighting.

    Raises:
        CorruptFileError: The file does not have this form, holds no score, or holds a number that is not finite.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        curves: dict[str, dict[float, float]] = {}
        for point in data["points"]:
            rule = f", {point['weighting']}" if "weighting" in point else ""
            for mark, scores in (("", point["scores"]), (" (control)", point.get("control", {}))):
                for name, score in scores.items():
                    curves.setdefault(f"{name}{mark}{rule}", {})[float(point["scale"])] = float(score)
        if not curves or not all(math.isfinite(number) for curve in curves.values() for pair in curve.items() for number in pair):
            raise ValueError("no score, or one that is not finite")
        best = data.get("best")
        chosen = "" if best is None else f"{best['weighting']} at scale {float(best['scale']):g}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f'{path} holds no scale curve ({error!r}): expected {{"points": [{{"scale": number, "scores": {{name: number}}}}]}}'
        ) from error
    rising = {name: dict(sorted(curve.items())) for name, curve in curves.items()}
    return ScaleCurves(rising, str(data.get("metric", "score")), chosen)


def _open(path: Path, given: str, label: str) -> Subject:
    if path.is_file():
        return Subject(label, given, scales=read_scales(path))
    if holds_vector(path):
        return Subject(label, given, vector=TaskVector.open(path), vector_path=path)
    history, vector, tuned = path / HISTORY_NAME, path / VECTOR_NAME, path / TUNE_NAME
    known = (history, tuned, path / MERGE_RECORD, path / SCORES_NAME)
    if not (holds_vector(vector) or any(file.is_file() for file in known)):
        names = ", ".join([VECTOR_NAME, *(file.name for file in known[:-1])])
        raise SourceError(f"{given} is no run, vector or merged model: it holds no {names} or {SCORES_NAME}. {_hint(path)}")
    onto, terms = _merge(path / MERGE_RECORD)
    subject = Subject(
        label,
        given,
        history=_history(history),
        vector=TaskVector.open(vector) if holds_vector(vector) else None,
        vector_path=vector if holds_vector(vector) else None,
        scales=read_scales(tuned) if tuned.is_file() else None,
        terms=terms,
        onto=onto,
        scores=_scores(path / SCORES_NAME),
        intervals=_intervals(path / SCORES_NAME),
    )
    if not (subject.history or subject.vector or subject.scales or subject.terms or subject.scores):
        raise SourceError(f"the history of {given} is empty: nothing has been measured yet. Wait for the first epoch to end.")
    return subject


def _name(path: Path) -> str:
    whole = path.resolve()
    # A run is named after the folder that contains the callback's folder.
    return whole.parent.name if whole.name in (VECTOR_NAME, TUNE_NAME, CALLBACK_FOLDER) else whole.name or str(whole)


def _hint(path: Path) -> str:
    if not path.exists():
        return "There is nothing at this path; check the spelling."
    below = [child.name for child in path.iterdir() if (child / HISTORY_NAME).is_file() or holds_vector(child)]
    return f"Name what lies in it, {first_three(below)}." if below else "Give the output_dir of a LATACallback, or what lata extract wrote."


def _merge(path: Path) -> tuple[str | None, tuple[Mapping[str, Any], ...]]:
    """Read from the record of a merge what the vectors were added to, and the entry of each vector."""
    if not path.is_file():
        return None, ()
    record = read_object(path)
    try:
        terms = tuple({"vector": str(term["vector"]), "scale": float(term["scale"]), **term} for term in record["terms"])
        return str(record["onto"]["location"] or "weights in memory"), terms
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is no merge record ({error!r}). Was it changed by hand?") from error


def _scores(path: Path) -> Mapping[str, Mapping[str, float | None]]:
    """Read scores by data set and metric; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return {
            name: {measure: None if value is None else float(value) for measure, value in row.items()}
            for name, row in read_object(path)["scores"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path} holds no scores of lata evaluate ({error!r})") from error


def _intervals(path: Path) -> Mapping[tuple[str, str], tuple[float, float]]:
    """Return the confidence intervals by data set and metric; none where the file does not hold any."""
    if not path.is_file():
        return {}
    try:
        return {
            (name, metric): (float(ends[0]), float(ends[1]))
            for name, row in read_object(path).get("sample", {}).items()
            for metric, ends in row["intervals"].items()
            if ends is not None
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFileError(f"{path} holds no scores of lata evaluate ({error!r})") from error


def _history(path: Path) -> tuple[HistoryEntry, ...]:
    entries = []
    for number, row in enumerate(read_history(path), start=1):
        try:
            entries.append(_entry(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"line {number} of {path} is no measurement ({error!r}). Was it changed by hand?") from error
    return tuple(entries)


def _entry(row: Mapping[str, Any]) -> HistoryEntry:
    measured = MeasuredStep.from_json(row)
    figures, alignment = measured.figures, measured.alignment
    cosines = {name.removeprefix(COSINE): value for name, value in figures.items() if name.startswith(COSINE)}
    numbers: list[float | None] = list(figures.values())
    for stats in (*alignment.layers.values(), *alignment.outside.values()):
        numbers += [stats.alignment, stats.relative_norm, stats.task_norm, stats.instruction_norm, stats.coefficient]
    if not all(value is None or math.isfinite(value) for value in numbers):
        raise ValueError("a value that is not finite")
    whole = figures.get("alignment"), figures.get("relative_norm")
    return HistoryEntry(measured.step, measured.epoch, figures["task_norm"], *whole, alignment, cosines)
