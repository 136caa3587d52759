"""The loggers of a Lightning Trainer: metrics, tables and the heat map of a run, each to those that take it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger

from lata_lightning.alignment import Alignment
from lata_lightning.callbacks.metrics import metrics_of
from lata_lightning.display.charts import alignment_over_training
from lata_lightning.live.history import MeasuredStep, read_history
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


def log_measured(loggers: Sequence[Logger], name: str, measured: MeasuredStep, step: int) -> None:
    """Send a measurement to each logger: as metrics, and the layers as a table where the logger has tables (W&B).

    Args:
        loggers: The loggers of the trainer.
        name: Prefix of the keys (see ``metrics_of``).
        measured: The measurement.
        step: The step that the trainer logs by.
    """
    epoch = {} if measured.epoch is None else {"epoch": float(measured.epoch)}
    by_figure = measured.layers()
    columns = ["alignment", "relative_norm", "task_norm", *(f"cosine/{other}" for other in measured.cosines)]
    rows = [[layer, *(by_figure[column].get(layer) for column in columns)] for layer in measured.alignment.layers]
    for logger in loggers:
        logger.log_metrics({**metrics_of(name, measured), **epoch}, step=step)
        log_table = getattr(logger, "log_table", None)
        if log_table is not None:
            log_table(key=f"{name}/layers", columns=["layer", *columns], data=rows, step=step)
