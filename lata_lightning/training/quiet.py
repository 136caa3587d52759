"""Keeping off the screen what frameworks say in every run and nobody can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LINES = (
    "Seed set to", "GPU available:", "TPU available:", "HPU available:", "💡 Tip:", "Loading `train_dataloader` to estimate", "`Trainer.fit` stopped:",
    "Detected KeyboardInterrupt",
)  # fmt: skip
"""How lines of Lightning begin that are left out: what machine it runs on, advertisements, and what lata says itself."""
_WARNINGS = (
    r".*treespec, LeafSpec", r".*is_gradient_checkpointing", r".*does not have many workers", r".*smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty", r"Total length of `list` across ranks is zero",
)  # fmt: skip
"""Deprecations between the frameworks, and advice about settings that recipes choose on purpose."""
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed")


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out known tips, deprecations and progress bars of the frameworks in the block; everything else is shown."""
    import datasets
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    bars = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.addFilter(_worth_reading)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_worth_reading)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def _worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_LINES)
