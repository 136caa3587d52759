"""The loggers of a Lightning Trainer: metrics, tables and the heat map of a run, each to those that take it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger

from lata_lightning.alignment import Alignment
from lata_lightning.display.charts import alignment_over_training
from lata_lightning.live.history import read_history
from lata_lightning.store.run_directory import HISTORY_NAME


def log_heat_map(loggers: Sequence[Logger], prefix: str, directory: Path | None, step: int) -> None:
    """Send the alignment of every layer over the run, as ``{prefix}/alignment_by_layer``, to each logger that takes figures or images.

    Those are loggers whose experiment has ``add_figure`` (TensorBoard), and those that have ``log_image`` (W&B). Nothing is sent without
    matplotlib (the extra ``report``), without an output directory, and where no alignment was measured.
    """
    if directory is None or find_spec("matplotlib") is None:
        return
    drawing = [(getattr(getattr(logger, "experiment", None), "add_figure", None), getattr(logger, "log_image", None)) for logger in loggers]
    if not any(add_figure or log_image for add_figure, log_image in drawing):
        return
    rows = read_history(directory / HISTORY_NAME)
    chart = alignment_over_training([(row["step"], row["epoch"], Alignment.from_json(row)) for row in rows])
    if chart is None:
        return
    from lata_lightning.display.pictures import draw, pixels

    for add_figure, log_image in drawing:
        if add_figure is not None:
            add_figure(f"{prefix}/alignment_by_layer", draw(chart), global_step=step)
        elif log_image is not None:
            log_image(key=f"{prefix}/alignment_by_layer", images=[pixels(draw(chart))], step=step)


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
