"""What was measured during a run: figures of the whole model and of every layer, and the JSON Lines file that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lata_lightning.alignment import Alignment
from lata_lightning.moments import Moments

COSINE = "cosine/"
"""What the names of figures begin with that are cosines with other vectors."""


@dataclass(frozen=True)
class MeasuredStep:
    """One measurement of a model in training.

    Attributes:
        step: Optimizer steps done.
        epoch: The epoch under way, from 0; None where the loop says none.
        figures: Figures of the whole model: ``task_norm``, and those that are defined of ``alignment``, ``relative_norm``, ``alignment_min``,
            ``alignment_max``, ``alignment_spread`` and ``cosine/{other}`` for each vector to compare with.
        alignment: Alignment of each layer.
        cosines: Cosine of each layer with that of another vector, by the name of the vector.
    """

    step: int
    epoch: int | None
    figures: Mapping[str, float]
    alignment: Alignment
    cosines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def layers(self) -> dict[str, dict[str, float]]:
        """Return the figures of every layer, by figure and layer; those that are undefined are left out."""
        figures: dict[str, dict[str, float]] = {"alignment": {}, "relative_norm": {}, "task_norm": {}}
        for layer, stats in self.alignment.layers.items():
            of_layer = {"alignment": stats.alignment, "relative_norm": stats.relative_norm, "task_norm": stats.task_norm}
            for figure, value in of_layer.items():
                if value is not None:
                    figures[figure][layer] = value
        return {**figures, **{f"{COSINE}{other}": dict(values) for other, values in self.cosines.items()}}

    def to_json(self) -> dict[str, Any]:
        """Return plain types for JSON: step, epoch, the figures of the model, and those of every layer."""
        cosines = {"cosines": {other: dict(values) for other, values in self.cosines.items()}} if self.cosines else {}
        return {"step": self.step, "epoch": self.epoch, **self.figures, **self.alignment.to_json(), **cosines}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeasuredStep:
        """Return the measurement of which ``to_json`` gave this."""
        others = {"step", "epoch", "level", "start", "layers", "outside", "cosines"}
        figures = {name: float(value) for name, value in data.items() if name not in others}
        epoch = data["epoch"]
        return cls(int(data["step"]), None if epoch is None else int(epoch), figures, Alignment.from_json(data), data.get("cosines", {}))


def summary(whole: Moments, alignment: Alignment, known_instruction: bool) -> dict[str, float]:
    """Return the figures of the whole model by name; those that are undefined are left out.

    Args:
        whole: Sums over the whole model.
        alignment: Alignment of each layer.
        known_instruction: Whether there is an instruction vector; without one the norm is the only figure.
    """
    figures: dict[str, float | None] = {"task_norm": whole.task_norm}
    if known_instruction:
        values = list(alignment.values.values())
        figures["alignment"] = whole.alignment
        figures["relative_norm"] = whole.relative_norm
        figures["alignment_min"] = min(values, default=None)
        figures["alignment_max"] = max(values, default=None)
        figures["alignment_spread"] = alignment.spread if values else None
    return {name: value for name, value in figures.items() if value is not None}


def append_history(path: Path, measured: MeasuredStep) -> None:
    """Add one line to a history; the file and its folder are made where they are missing."""
    line = json.dumps(measured.to_json(), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a history, oldest first; none if there is no such file. A last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_history(path: Path, last_step: int) -> None:
    """Drop the lines after a step, which a resumed run is about to measure again."""
    before = [row for row in read_history(path) if row["step"] <= last_step]
    if path.is_file():
        write_history(path, before)


def write_history(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a history, and replace the one that is there; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), "utf-8")
    partial.replace(path)
