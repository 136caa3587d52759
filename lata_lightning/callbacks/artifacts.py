"""The task vector of a run as an artifact of Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from lata_lightning.errors import LataError

KIND = "task_vector"
"""Type of the artifact."""


def check_artifact(loggers: Sequence[Logger]) -> None:
    """Refuse to begin where an artifact is wanted and nothing takes one.

    Raises:
        LataError: No logger is a WandbLogger.
    """
    if not any(isinstance(logger, WandbLogger) for logger in loggers):
        raise LataError("log_artifact=True needs a WandbLogger among the trainer's loggers, which is what takes artifacts; there is none")


def log_artifact(loggers: Sequence[Logger], name: str, directory: Path) -> None:
    """Send a saved task vector to each WandbLogger, as an artifact of the type ``task_vector``.

    Args:
        loggers: Loggers of the trainer; the others get nothing.
        name: Name of the callback; the artifact is called after it and the id of the run.
        directory: The saved vector.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log_artifact(str(directory), name=f"{name}-{logger.version}", type=KIND)
