"""How task arithmetic is judged: addition by normalised accuracy, negation by what is left of the target at a control that holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.scales import best_scale
from lata_lightning.evaluation.weight_functions import check_scales

UNIT_SCALES = tuple(step / 20 for step in range(21))
"""21 points in [0, 1]."""
CONTROL_SHARE = 0.95


class Addition(NamedTuple):
    """Outcome of ``addition``.

    Attributes:
        scale: The one scale of all vectors, picked on validation.
        accuracy: Test accuracy by task at that scale.
        normalised: Their mean normalised accuracy.
        curve: Mean normalised accuracy on validation by scale.
    """

    scale: float
    accuracy: dict[str, float]
    normalised: float
    curve: dict[float, float]


class Negation(NamedTuple):
    """Outcome of ``negation``.

    Attributes:
        scale: How much of the vector is taken off, picked on validation.
        target: Test accuracy on what is to be forgotten.
        control: Test accuracy on what is to stay.
        curve: Target and control accuracy on validation by scale.
    """

    scale: float
    target: float
    control: float
    curve: dict[float, tuple[float, float]]


def normalised_accuracy(merged: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Mean over the tasks of merged accuracy / accuracy of the task's own single-task model; dimensionless, may exceed 1.

    Args:
        merged: Accuracy of the merged model by task.
        single: Accuracy of each task's own model, for the same tasks.

    Raises:
        LataError: There is no task, the tasks differ, or an own model has no accuracy to divide by.

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
    """Accuracy of θ0 + scale · Σ τ at the scale that is best on validation, tested once.

    Args:
        validation: Validation accuracy by task of the model merged at a scale.
        test: Test accuracy by task of the model merged at a scale; called once.
        single_validation: Validation accuracy of each task's own model.
        single_test: Test accuracy of each task's own model.
        scales: To choose from; of equally good ones the smallest.

    Raises:
        LataError: No scales, or see ``normalised_accuracy``.

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
    """The smallest target accuracy of θ0 − scale · τ at which the control task keeps its share of the start's accuracy, tested once.

    Args:
        validation: Target and control accuracy on validation of the model with so much of the vector taken off.
        test: The same on test; called once.
        scales: To choose from, 0 (the start) among them; of equally good ones the smallest.
        control_share: Share of the start's control accuracy that has to be kept.

    Raises:
        LataError: No scales, none that is 0, or a share outside [0, 1].

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
