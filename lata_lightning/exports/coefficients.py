"""Exporting the coefficients and alignments of vectors, as JSON and as a table for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lata_lightning.errors import LataError
from lata_lightning.store.writer import atomic_directory, write_json
from lata_lightning.vectors.task_vector import TaskVector

COEFFICIENTS_JSON = "coefficients.json"
COEFFICIENTS_CSV = "coefficients.csv"
_COLUMNS = ("vector", "layer", "ranked", "alignment", "relative_norm", "task_norm", "instruction_norm", "coefficient")


def export_coefficients(vectors: Sequence[TaskVector], output: str | Path) -> Path:
    """Write ``coefficients.json`` and ``coefficients.csv`` of one or several vectors.

    The JSON holds ``level``, ``outside``, ``weighting``, ``threshold`` (null for rules without one) and ``vectors``: for each its label, its
    coefficient by layer and its alignment (null if none is stored). An unweighted vector has coefficient 1 everywhere and the weighting ``none``. The
    CSV has one row for each layer and, with ``ranked`` false, one for each tensor outside the layers; fields that were not measured are empty.

    Raises:
        LataError: The vectors are weighted by different rules.
        OutputError: The output exists, or cannot be written.
    """
    rules = [_rule(vector) for vector in vectors]
    odd = next((index for index, rule in enumerate(rules) if rule != rules[0]), None)
    if odd is not None:
        raise LataError(
            f"one file holds vectors of one rule; {vectors[0].label} has {rules[0]} and {vectors[odd].label} has {rules[odd]}. Export them one by one."
        )
    entries = [
        {
            "vector": vector.label,
            "coefficients": _coefficients(vector),
            "alignment": None if vector.manifest.alignment is None else vector.manifest.alignment.to_json(),
        }
        for vector in vectors
    ]
    with atomic_directory(Path(output)) as directory:
        write_json(directory / COEFFICIENTS_JSON, {**rules[0], "vectors": entries})
        with (directory / COEFFICIENTS_CSV).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            table.writerows(row for vector in vectors for row in _rows(vector))
    return Path(output)


def _rule(vector: TaskVector) -> dict[str, Any]:
    manifest = vector.manifest
    weighted = manifest.coefficients is not None
    return {
        "level": manifest.level,
        "outside": manifest.outside if weighted else 1.0,
        "weighting": manifest.weighting if weighted else "none",
        "threshold": manifest.threshold if weighted and manifest.weighting == "threshold" else None,
    }


def _coefficients(vector: TaskVector) -> dict[str, float]:
    stored = vector.manifest.coefficients
    return {layer: 1.0 if stored is None else stored[layer] for layer in vector.layers.layers(vector.manifest.level)}


def _rows(vector: TaskVector) -> Iterator[tuple[Any, ...]]:
    alignment, outside = vector.manifest.alignment, _rule(vector)["outside"]
    for ranked, by_layer in ((True, _coefficients(vector)), (False, dict.fromkeys(vector.layers.outside(), outside))):
        measured = {} if alignment is None else alignment.layers if ranked else alignment.outside
        for layer, coefficient in by_layer.items():
            stats = measured.get(layer)
            figures = (None,) * 4 if stats is None else (stats.alignment, stats.relative_norm, stats.task_norm, stats.instruction_norm)
            yield (vector.label, layer, "true" if ranked else "false", *figures, coefficient)
