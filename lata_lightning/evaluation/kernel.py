"""Kernel behaviour: how well a first-order expansion describes the change of a model's outputs along a task vector."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.weight_functions import Outputs, WeightFunction, check_scales, model_outputs
from lata_lightning.layers import layer_map


def linearisation_error(
    model: nn.Module,
    task_vector: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    start: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    module_sets: Mapping[str, Collection[str]] | None = None,
    outputs: Outputs = model_outputs,
) -> dict[str, float]:
    """Compute ‖f(θ0 + s τ) − f(θ0) − s J τ‖ / ‖f(θ0 + s τ) − f(θ0)‖ for each set of modules, with the vector restricted to the set.

    0 for a model that is linear in those weights along the vector. J τ comes from forward-mode differentiation, without computing the Jacobian.

    Args:
        model: Has the weights θ0 unless ``start`` is given; in evaluation mode while this runs, and otherwise unchanged.
        task_vector: τ by parameter name; parameters that it lacks do not change.
        batches: Read once; norms are over the outputs on all batches.
        start: θ0 by parameter name.
        scale: s, dimensionless.
        module_sets: Parameter names by set; by default ``all``, every part of the blocks (see ``LayerMap``), and ``outside`` for parameters in no
            block.
        outputs: Takes model and batch, and returns a tensor. Leave padding out.

    Returns:
        Dimensionless, 0 or more, in the order of the sets; sets along which the outputs do not change at all are absent.

    Raises:
        LataError: The scale is not finite, there is no batch, or a set names a parameter that the model does not have.
        LayoutMismatchError: The vector does not belong to the model.
    """
    (scale,) = check_scales([scale])
    function = WeightFunction(model, start, outputs)
    vector = function.load(task_vector, "the task vector")
    sets = _parts(model, vector) if module_sets is None else module_sets
    unknown = {name for names in sets.values() for name in names} - set(function.start)
    if unknown:
        raise LataError(f"module sets must name parameters of the model; it has none named {first_three(unknown)}")
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in sets}
    seen = 0
    # Only this attention kernel of torch supports forward-mode differentiation.
    with function.evaluating(), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            seen += 1
            for name, members in sets.items():
                part = {member: (scale * vector[member]).to(function.start[member].dtype) for member in members if member in vector}
                if part:
                    sums[name] += _squares(function, part, batch)
    if seen == 0:
        raise LataError("the linearisation error needs at least one batch")
    return {
        name: math.sqrt(remainder / change) for name, (remainder, change) in ((key, pair.tolist()) for key, pair in sums.items()) if change
    }


def _squares(function: WeightFunction, part: Mapping[str, Tensor], batch: Any) -> Tensor:
    """Return the squared norms of the remainder after first order and of the whole change, float64."""
    moving = {name: function.start[name] for name in part}

    def outputs_at(weights: Mapping[str, Tensor]) -> Tensor:
        return function({**function.start, **weights}, batch)

    before, first_order = jvp(outputs_at, (moving,), (dict(part),))[:2]
    change = (outputs_at({name: moving[name] + part[name] for name in part}) - before).double()
    remainder = change - first_order.double()
    return torch.stack([remainder.square().sum(), change.square().sum()]).cpu()


def _parts(model: nn.Module, vector: Mapping[str, Tensor]) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {"all": list(vector)}
    for name, position in layer_map(vector, structure=model).positions.items():
        sets.setdefault(position.part if position.block is not None else "outside", []).append(name)
    return sets
