"""The cards of a report: one run or vector at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lata_lightning.alignment import Alignment
from lata_lightning.display.charts import as_text
from lata_lightning.moments import Moments, total
from lata_lightning.report.reading import Subject

_ADVICE = "Merge with --weighting none, or let lata tune compare the rules on validation data."


class Card(NamedTuple):
    """One run or vector at a glance; ``colour`` is the number of its line in every chart."""

    label: str
    colour: int
    kind: str
    figures: list[tuple[str, str]]
    warning: str | None


def card(subject: Subject, number: int, last: Alignment | None, table: Mapping[str, Moments] | None) -> Card:
    """Return the card of a run or vector.

    Args:
        subject: The input of the report.
        number: Number of that input, which decides its colour.
        last: Final alignment of the run, if known.
        table: Moments of the vector by tensor name, if there is a vector.
    """
    end = subject.history[-1] if subject.history else None
    whole = None if table is None else total(table.values())
    alignment = whole.alignment if whole is not None and whole.alignment is not None else end.alignment if end else None
    relative = whole.relative_norm if whole is not None and whole.relative_norm is not None else end.relative_norm if end else None
    norm = whole.task_norm if whole is not None else end.task_norm if end else None
    spread = last.spread if last is not None and last.values else None
    stats = (
        ("alignment", alignment, ".4f"),
        ("relative norm", relative, ".4f"),
        ("norm", norm, ".4g"),
        ("spread of the layers", spread, ".4f"),
    )
    known = [(name, as_text(value, form)) for name, value, form in stats if value is not None]
    cautions = [] if last is None else last.cautions()
    if last is not None and last.flat:
        cautions.append(_ADVICE)
    return Card(subject.label, number, _kind(subject), known, " ".join(cautions) or None)


def _kind(subject: Subject) -> str:
    manifest = None if subject.vector is None else subject.vector.manifest
    words = []
    if subject.history:
        count = len(subject.history)
        words += [f"run, {count} measurement{'' if count == 1 else 's'}", f"step {subject.history[-1].step}"]
        if manifest is None:
            words.append("no vector yet")
    elif manifest is not None:
        words += [f"{manifest.kind} vector", *([] if manifest.step is None else [f"step {manifest.step}"])]
    if manifest is not None and manifest.kind == "task":
        words.append(f"started from {manifest.start}")
    if subject.terms:
        words.append(f"merged model, {len(subject.terms)} vector{'' if len(subject.terms) == 1 else 's'}")
    elif subject.scores and not words:
        words.append("scores")
    if subject.scales is not None:
        words.append(f"chosen: {subject.scales.chosen}" if subject.scales.chosen else "scales tried")
    return " · ".join(words)
