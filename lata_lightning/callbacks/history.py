"""What was measured during a run: a JSON Lines file, and the loggers of the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lata_lightning.alignment import Alignment
from lata_lightning.moments import Moments

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

HISTORY_NAME = "history.jsonl"


def summary(whole: Moments, alignment: Alignment, known_instruction: bool) -> dict[str, float]:
    """The figures of the whole model; those that are undefined are left out."""
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
    """Add one line: step, epoch (from 0, as Lightning counts), the model's figures, and those of every layer."""
    line = json.dumps({"step": step, "epoch": epoch, **figures, **alignment.to_json()}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history, oldest first; none if there is no such file. A last line that was cut off by a crash is left out."""
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
    kept = [row for row in read_history(path) if row["step"] <= last_step]
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        partial.replace(path)


def log_figures(loggers: Sequence[Logger], prefix: str, figures: dict[str, float], alignment: Alignment, step: int) -> None:
    """Send the figures of the model and of every layer to each logger: as metrics, and the layers as a table where it has tables (W&B)."""
    metrics = {f"{prefix}/{figure}": value for figure, value in figures.items()}
    for layer, stats in alignment.layers.items():
        of_layer = {"alignment": stats.alignment, "relative_norm": stats.relative_norm, "task_norm": stats.task_norm}
        metrics |= {f"{prefix}/{figure}/{layer}": value for figure, value in of_layer.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(metrics, step=step)
        log_table = getattr(logger, "log_table", None)
        if log_table is not None:
            rows = [[layer, stats.alignment, stats.relative_norm, stats.task_norm] for layer, stats in alignment.layers.items()]
            log_table(key=f"{prefix}/layers", columns=["layer", "alignment", "relative_norm", "task_norm"], data=rows, step=step)
