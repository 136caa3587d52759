"""The contents of a report, as plain data: its cards, and its sections with charts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lata_lightning.alignment import Alignment, alignment_of
from lata_lightning.display.charts import Chart, as_text
from lata_lightning.errors import BaseMismatchError
from lata_lightning.moments import Moments
from lata_lightning.report import figures, score_figures
from lata_lightning.report.cards import Card, card
from lata_lightning.report.measuring import PairwiseMoments, measure_together
from lata_lightning.report.provenance import Facts, provenance
from lata_lightning.report.reading import Subject, open_subjects
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.aligning import check_same_start
from lata_lightning.vectors.task_vector import TaskVector

_MOST_IN_TITLE = 4


class Section(NamedTuple):
    """Charts and tables under a heading, or a sentence that says why there are none."""

    key: str
    title: str
    lead: str
    charts: Sequence[Chart]
    tables: Sequence[Facts] = ()
    empty: str = ""


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: Title of the page.
        cards: One for each run or vector.
        notices: Warnings to read before comparing.
        sections: The sections in order.
    """

    title: str
    cards: Sequence[Card]
    notices: Sequence[str]
    sections: Sequence[Section]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        return [chart for section in self.sections for chart in section.charts]


def build(
    paths: Sequence[str | Path], instruction: str | Path | None = None, *, check_base: bool = True, progress: Progress | None = None
) -> Report:
    """Read runs and vectors, measure the vectors, and collect the contents of a report.

    Args:
        paths: Output directories of runs, saved vectors, or files with a scale curve (see ``open_subjects``).
        instruction: A saved instruction vector to measure the alignment with.
        check_base: Refuse an instruction vector that is known to belong to other weights.
        progress: Called while tensors are read.

    Returns:
        The report; the same input gives the same report.

    Raises:
        LataError: As for ``open_subjects`` and ``measure_together``.
    """
    subjects = open_subjects(paths)
    direction = None if instruction is None else TaskVector.open(instruction)
    saved = [(number, subject, subject.vector) for number, subject in enumerate(subjects) if subject.vector is not None]
    vectors = [vector for _, _, vector in saved]
    measured = measure_together(vectors, direction, check_base=check_base, progress=progress)
    tables = {number: table for (number, _, _), table in zip(saved, measured.tables, strict=True)}
    last = {number: final for number, subject in enumerate(subjects) if (final := _last(subject, tables.get(number))) is not None}
    histories = [(number, subject.label, subject.history) for number, subject in enumerate(subjects) if subject.history]
    shown = [(number, subjects[number].label, alignment) for number, alignment in last.items()]
    return Report(
        title=_title([subject.label for subject in subjects]),
        cards=[card(subject, number, last.get(number), tables.get(number)) for number, subject in enumerate(subjects)],
        notices=_notices(vectors),
        sections=[
            section
            for section in (
                _training(histories),
                _growth(histories),
                _layers(shown),
                _parts([(number, subject.label, vector) for number, subject, vector in saved], tables, direction is not None),
                _pairs([subject.label for _, subject, _ in saved], measured, vectors),
                _conflicts([(number, subject.label, vector) for number, subject, vector in saved]),
                _models(subjects),
                _scales(subjects),
                _provenance([(subject.label, subject.vector_path) for _, subject, _ in saved]),
            )
            if section is not None
        ],
    )


def _title(labels: Sequence[str]) -> str:
    return (
        ", ".join(labels)
        if len(labels) <= _MOST_IN_TITLE
        else f"{', '.join(labels[:_MOST_IN_TITLE])} and {len(labels) - _MOST_IN_TITLE} more"
    )


def _last(subject: Subject, table: Mapping[str, Moments] | None) -> Alignment | None:
    """Return the final alignment of each layer: stored with the vector, measured now, or the last entry of the history."""
    vector = subject.vector
    if vector is None or table is None:
        return subject.history[-1].layers if subject.history else None
    manifest = vector.manifest
    # Stored coefficients belong to the stored alignment.
    return manifest.alignment or alignment_of(table, vector.layers, manifest.level, manifest.start)


def _notices(vectors: Sequence[TaskVector]) -> list[str]:
    try:
        check_same_start([vector for vector in vectors if vector.manifest.kind == "task"])
    except BaseMismatchError:
        return ["The vectors started from different weights: compare their growth, but do not read their cosines as those of one origin."]
    return []


def _training(histories: figures.Histories) -> Section:
    charts = figures.alignment_heat_maps(histories)
    empty = ""
    if not histories:
        empty = "Saved vectors have no history. Give the output_dir of a LATACallback to see how the alignment went."
    elif not charts:
        empty = "No instruction vector was given to the callback, so only norms were measured: LATACallback(instruction_vector=…)."
    return Section(
        "training",
        "Alignment over training",
        "How far each layer points along instruction following, measurement by measurement. All runs share one colour scale.",
        charts,
        empty=empty,
    )


def _growth(histories: figures.Histories) -> Section:
    return Section(
        "growth",
        "Growth",
        "How far the weights have moved from where the fine-tune started.",
        figures.growth(histories),
        empty="" if histories else "Saved vectors have no history. Give the output_dir of a LATACallback to see the vector grow.",
    )


def _layers(shown: Sequence[tuple[int, str, Alignment]]) -> Section | None:
    if not shown:
        return None
    rows = [
        [
            label,
            name,
            # The alignment of a tensor that did not change is 1, which would be misleading.
            as_text(stats.alignment if stats.task_norm else None, ".4f"),
            as_text(stats.relative_norm if stats.task_norm else None, ".4f"),
            as_text(stats.task_norm or None, ".4g"),
            as_text(stats.coefficient, ".4f"),
        ]
        for _, label, alignment in shown
        for name, stats in alignment.outside.items()
    ]
    heads = ["vector", "tensor", "alignment", "relative norm", "norm", "coefficient"]
    charts = figures.by_layer(shown)
    return Section(
        "layers",
        "Layers",
        "Where each vector ended, layer by layer. Better aligned layers get the smaller coefficients.",
        charts,
        [Facts("Outside the layers", heads, rows)] if rows else [],
        "" if charts else "No tensor belongs to a block, so there is no layer to show.",
    )


def _parts(saved: Sequence[tuple[int, str, TaskVector]], tables: Mapping[int, Mapping[str, Moments]], along: bool) -> Section:
    charts = []
    if saved:
        charts = figures.by_part([(number, label, tables[number]) for number, label, _ in saved], saved[0][2].layers)
    lead = "Attention, MLP, norms and the rest of each block. All vectors share a colour scale."
    if charts and not along:
        lead += " With --instruction VECTOR relative norm and alignment are shown as well."
    empty = "" if charts else "No tensor belongs to a block." if saved else "This needs a saved vector: a run writes it when training ends."
    return Section("parts", "Parts", lead, charts, empty=empty)


def _pairs(labels: Sequence[str], measured: PairwiseMoments, vectors: Sequence[TaskVector]) -> Section:
    lead = "Do the vectors point the same way? Near 0 they can be added without disturbing each other; near 1 they learned the same."
    if len(vectors) < 2:
        return Section("pairs", "Pairs", lead, [], empty="Name a second run or vector to compare this one with.")
    return Section("pairs", "Pairs", lead, figures.pairwise(labels, measured, vectors[0].layers))


def _conflicts(saved: Sequence[tuple[int, str, TaskVector]]) -> Section | None:
    made = [(number, label, vector.manifest.derivation) for number, label, vector in saved if vector.manifest.derivation is not None]
    charts = figures.interference([(number, label, derivation) for number, label, derivation in made if derivation is not None])
    lead = (
        "Which layers of which vectors get into each other's way: the share of what a vector does on its own inputs, as these show in its weights, that "
        "making it one with the others changes. 0 is nothing."
    )
    return Section("interference", "Interference", lead, charts) if charts else None


def _scales(subjects: Sequence[Subject]) -> Section | None:
    charts = [
        score_figures.scale_curve(number, subject.label, subject.scales)
        for number, subject in enumerate(subjects)
        if subject.scales is not None
    ]
    return Section("scales", "Scales", "What every scale scored.", charts) if charts else None


def _models(subjects: Sequence[Subject]) -> Section | None:
    """Return the scores of all models, and the vectors of which merged models are made."""
    terms = [
        [
            subject.label if number == 0 else "",
            (subject.onto or "–") if number == 0 else "",
            term["vector"],
            f"{term['scale']:g}",
            str(term.get("weighting") or "none"),
        ]
        for subject in subjects
        for number, term in enumerate(subject.terms)
    ]
    columns = list(dict.fromkeys((name, measure) for subject in subjects for name, row in subject.scores.items() for measure in row))
    scores = [[subject.label, *(_score(subject, name, measure) for name, measure in columns)] for subject in subjects if subject.scores]
    tables = [
        Facts("Scores", ["model", *(f"{name}, {measure.replace('_', ' ')}" for name, measure in columns)], scores),
        Facts("What was added", ["model", "onto", "vector", "scale", "weighting"], terms),
    ]
    tables = [table for table in tables if table.rows]
    if not tables:
        return None
    empty = (
        "" if scores else "lata evaluate MODEL --data FILE --output MODEL puts the scores of a model beside it; they are shown here then."
    )
    charts = score_figures.scores_by_model([(subject.label, subject.scores) for subject in subjects if subject.scores])
    return Section("models", "Models", "Models side by side: what they are made of, and what they score.", charts, tables, empty)


def _score(subject: Subject, name: str, measure: str) -> str:
    """A score with its interval, where there is one."""
    text, interval = as_text(subject.scores.get(name, {}).get(measure), ".4g"), subject.intervals.get((name, measure))
    return text if interval is None else f"{text} ({interval[0]:.4g} – {interval[1]:.4g})"


def _provenance(vectors: Sequence[tuple[str, Path | None]]) -> Section | None:
    tables = [provenance(label, path) for label, path in vectors if path is not None]
    return Section("provenance", "Provenance", "What the manifests say of where each vector comes from.", [], tables) if tables else None
