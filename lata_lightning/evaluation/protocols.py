"""The evaluation protocols of task arithmetic: addition by normalised accuracy, negation by target accuracy under a control constraint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.scales import best_scale
from lata_lightning.evaluation.weight_functions import check_scales

UNIT_SCALES = tuple(step / 20 for step in range(21))
"""21 points in [0, 1]."""
CONTROL_SHARE = 0.95
"""Share of the control performance that must remain when a skill is forgotten."""


class Addition(NamedTuple):
    """Result of ``addition``.

    Attributes:
        scale: The scale of all vectors, chosen on validation data.
        accuracy: Test accuracy on each task at that scale.
        normalised: Mean normalised test accuracy.
        curve: Mean normalised validation accuracy at each scale.
    """

    scale: float
    accuracy: dict[str, float]
    normalised: float
    curve: dict[float, float]


class Negation(NamedTuple):
    """Result of ``negation``.

    Attributes:
        scale: The scale of the subtracted vector, chosen on validation data.
        target: Test accuracy on the task to forget.
        control: Test accuracy on the control task.
        curve: Target and control accuracy on validation data at each scale.
    """

    scale: float
    target: float
    control: float
    curve: dict[float, tuple[float, float]]


def normalised_accuracy(merged: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Return the mean over tasks of the merged model's accuracy / the single-task model's accuracy; dimensionless, may exceed 1.

    Args:
        merged: Accuracy of the merged model on each task.
        single: Accuracy of each task's single-task model.

    Raises:
        LataError: There is no task, the tasks differ, or a single-task accuracy is not positive.

    Source: Ortiz-Jimenez et al., arXiv:2305.12827.
    """
    if not single or set(merged) != set(single):
        raise LataError(
            f"normalised accuracy needs both accuracies of every task, at least one; on one side only are {first_three(set(merged) ^ set(single))}"
        )
    useless = [task for task, accuracy in single.items() if accuracy <= 0]
    if useless:
        raise LataError(
            f"the single-task accuracy must be above 0 to divide by; it is not in {first_three(useless)}. Train those tasks longer."
        )
    return sum(merged[task] / single[task] for task in single) / len(single)


def addition(
    validation: Callable[[float], Mapping[str, float]],
    test: Callable[[float], Mapping[str, float]],
    *,
    single_validation: Mapping[str, float],
    single_test: Mapping[str, float],
    scales: Sequence[float] = UNIT_SCALES,
) -> Addition:
    """Choose the scale of θ0 + scale · Σ τ on validation data, and test it once.

    Args:
        validation: Returns the validation accuracy on each task of the model merged at a scale.
        test: Returns the test accuracy on each task of the model merged at a scale; called once.
        single_validation: Validation accuracy of each task's single-task model.
        single_test: Test accuracy of each task's single-task model.
        scales: The candidates; the smallest of equally good ones is chosen.

    Raises:
        LataError: There are no scales, or as for ``normalised_accuracy``.

    Source: arXiv:2212.04089; the grid, arXiv:2305.12827.
    """
    curve = {scale: normalised_accuracy(validation(scale), single_validation) for scale in check_scales(scales)}
    scale = best_scale(curve)
    accuracy = dict(test(scale))
    return Addition(scale, accuracy, normalised_accuracy(accuracy, single_test), curve)


def negation(
    validation: Callable[[float], tuple[float, float]],
    test: Callable[[float], tuple[float, float]],
    *,
    scales: Sequence[float] = UNIT_SCALES,
    control_share: float = CONTROL_SHARE,
) -> Negation:
    """Choose the scale of θ0 − scale · τ with the lowest target accuracy at which the control accuracy stays high enough, and test it once.

    Args:
        validation: Returns target and control accuracy on validation data of the model at a scale.
        test: The same on test data; called once.
        scales: The candidates, including 0 (the start); the smallest of equally good ones is chosen.
        control_share: Share of the start's control accuracy that must remain.

    Raises:
        LataError: There are no scales, 0 is not among them, or the share is outside [0, 1].

    Source: arXiv:2212.04089, with the control of arXiv:2305.12827.
    """
    if not 0 <= control_share <= 1:
        raise LataError(f"control_share must lie between 0 and 1, got {control_share}")
    scales = check_scales(scales)
    if 0.0 not in scales:
        raise LataError(f"negation needs the scale 0, at which the start is measured, got {list(scales)}")
    curve = {scale: validation(scale) for scale in scales}
    needed = control_share * curve[0.0][1]
    scale = best_scale({scale: -target for scale, (target, control) in curve.items() if control >= needed})
    target, control = test(scale)
    return Negation(scale, target, control, curve)
