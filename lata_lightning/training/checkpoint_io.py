"""Lightning checkpoints that are written to disk as they are made, without a copy of the file in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override


class StreamedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints straight to a local file, which appears under its name only when it is complete.

    Lightning's own class builds the whole file in memory first. A checkpoint of a full fine-tune has three times the bytes of the weights, so that
    copy decides the peak memory of the run. Checkpoints on remote storage are written by Lightning's own class.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint.

        Args:
            checkpoint: State of the model and the trainer.
            path: Where to write; missing directories are made.
            storage_options: Not supported, as in Lightning's own class.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            torch.save(checkpoint, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def stream_checkpoints(trainer: Trainer) -> None:
    """Let a trainer of one device or DDP write its checkpoints by ``StreamedCheckpointIO``, unless it has a way of writing of its own."""
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = StreamedCheckpointIO()
