"""Progress of a whole fit in one line on standard error."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lata_lightning.callbacks.lata import LATACallback

_SECONDS_BETWEEN_LINES = 30.0


class FitProgress(ProgressBar):
    """Optimizer steps of all epochs, time left to the end of the fit, the losses, and the first figure of each LATACallback.

    On a terminal a bar; elsewhere a line at the end of each epoch, and every half minute in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._begun, self._shown = True, 0.0, 0.0
        self._bar: Progress | None = None

    def enable(self) -> None:
        """Show progress, as on the first process."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, as on all other processes."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar."""
        self._begun = self._shown = monotonic()
        self._first_step, total = trainer.global_step, trainer.estimated_stepping_batches
        self._total = int(total) if total != float("inf") else None
        console = Console(stderr=True)
        if self._enabled and console.is_terminal:
            columns = (
                TextColumn("fit"),
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            # Standard output is left alone: what is printed there may be read by another program.
            self._bar = Progress(*columns, console=console, redirect_stdout=False)
            self._task = self._bar.add_task("fit", total=self._total, completed=self._first_step, figures="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or say now and then how far the fit is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, figures=figures_of(trainer))
        elif monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._print(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how far the fit is, where there is no bar; the figures of an epoch are known when the next one begins."""
        if self._bar is None:
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the bar, or say how the fit ended, before anything is printed about the run."""
        if self._bar is None:
            self._print(trainer)
        self._stop(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the bar, so that the terminal is as it was."""
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, figures=figures_of(trainer))
            self._bar.stop()
            self._bar = None

    def _print(self, trainer: pl.Trainer) -> None:
        self._shown = monotonic()
        done = trainer.global_step - self._first_step
        if not self._enabled or not done:
            return
        words = [f"step {trainer.global_step}{'' if self._total is None else f' of {self._total}'}", figures_of(trainer)]
        if self._total is not None and trainer.global_step < self._total:
            words.append(f"about {(self._shown - self._begun) / done * (self._total - trainer.global_step):.0f} s left")
        sys.stderr.write(f"lata fit: {', '.join(word for word in words if word)}\n")


def figures_of(trainer: pl.Trainer) -> str:
    """Return the last losses, and alignment or norm of each LATACallback, as words."""
    metrics = trainer.callback_metrics
    names = [("loss", next((key for key in ("train_loss_step", "train_loss", "loss") if key in metrics), "")), ("validation", "val_loss")]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LATACallback):
            figure = next((key for key in ("alignment", "task_norm") if f"{callback.name}/{key}" in metrics), "")
            names.append((f"{callback.name} {figure.replace('_', ' ')}", f"{callback.name}/{figure}"))
    return ", ".join(f"{title} {float(metrics[key]):.4g}" for title, key in names if key in metrics)
