"""Evaluation mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, inference: bool = True) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; afterwards every module of it has the mode it had.

    Args:
        model: Any module.
        inference: Whether tensors made in the block are inference tensors, which save memory and which ``torch.func`` cannot use.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
