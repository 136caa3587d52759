"""What was measured during a run, as figures of the whole model and as lines of a JSON Lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lata_lightning.alignment import Alignment
from lata_lightning.moments import Moments


def summary(whole: Moments, alignment: Alignment, known_instruction: bool) -> dict[str, float]:
    """Return the figures of the whole model by name; those that are undefined are left out.

    Args:
        whole: Sums over the whole model.
        alignment: By layer.
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


def append_history(path: Path, step: int, epoch: int, figures: dict[str, float], alignment: Alignment) -> None:
    """Add one line: step, epoch (from 0, as Lightning counts), the figures of the model, and those of every layer."""
    line = json.dumps({"step": step, "epoch": epoch, **figures, **alignment.to_json()}, allow_nan=False)
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
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in before), "utf-8")
        partial.replace(path)
