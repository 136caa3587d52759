"""The optimizer and learning rate schedule of all modules here."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from lata_lightning.errors import LataError

Schedule = Literal["cosine", "linear", "constant"]


def check_optimizing(learning_rate: float, weight_decay: float, warmup_steps: int, final_share: float) -> None:
    """Refuse settings out of range.

    Raises:
        LataError: A setting is negative, or the last learning rate would be above the peak.
    """
    if learning_rate < 0 or weight_decay < 0 or warmup_steps < 0:
        raise LataError(
            f"learning_rate, weight_decay and warmup_steps must not be negative, not {learning_rate}, {weight_decay} and {warmup_steps}"
        )
    if not 0 <= final_share <= 1:
        raise LataError(f"final_learning_rate_share must lie between 0 and 1, not {final_share}")


def adamw(
    module: LightningModule,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    schedule: Schedule,
    warmup_steps: int,
    final_share: float,
) -> Any:
    """Return AdamW over the trainable parameters and its schedule by optimizer step, in the form that ``configure_optimizers`` returns.

    Weight decay applies to matrices, not to norms and biases (everything of one dimension).

    Raises:
        LataError: No parameter is trainable.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise LataError("there is nothing to train: every parameter of the module is frozen")
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)
    estimate = module.trainer.estimated_stepping_batches
    if math.isinf(estimate) and schedule != "constant":
        raise LataError(f"the schedule {schedule!r} falls towards the end of training: set max_epochs or max_steps, or take 'constant'")
    steps = 0 if math.isinf(estimate) else int(estimate)
    shares = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps, warmup_steps, final_share, schedule)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shares, "interval": "step"}}


def learning_rate_share(step: int, steps: int, warmup_steps: int, final_share: float, schedule: Schedule = "cosine") -> float:
    """Return the learning rate as a share of its peak: a linear rise, then half a cosine, a straight line or a constant.

    Args:
        step: Optimizer steps already taken.
        steps: Optimizer steps of the whole training.
        warmup_steps: Steps of the rise; step 0 has 1 / (warmup_steps + 1) of the peak, so that no step has a rate of 0.
        final_share: Value at the end and after it; ``"constant"`` stays at 1.
        schedule: Form of the decay after the rise.

    Returns:
        Dimensionless, in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_share + (1 - final_share) * left
