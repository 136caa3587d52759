"""Trying many scales on one model in memory, and choosing among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from lata_lightning.errors import LataError, LayoutMismatchError, first_three
from lata_lightning.merging.merge import Term
from lata_lightning.numerics.combine import combine


class ResidualSearch(NamedTuple):
    """Outcome of ``scale_for_residual``: the scale found, and the residual at every scale tried."""

    scale: float | None
    tried: dict[float, float]


class Reweighting:
    """A model whose weights are set, point by point, to its own plus Σ scale · coefficient · vector.

    The weights are bit for bit those that ``merge`` writes for the same terms. Each vector is read once, however many points are tried.

    Args:
        model: Changed in place by ``apply``; ``restore`` gives it its own weights back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        # On the CPU, where the sums are formed, also for a model that is elsewhere.
        self._onto = {name: tensor.to("cpu", copy=True) for name, tensor in self._parameters.items()}
        self._vectors: dict[int, dict[str, Tensor]] = {}

    def apply(self, terms: Sequence[Term]) -> None:
        """Set the weights to onto + Σ scale · coefficient · vector.

        Raises:
            LayoutMismatchError: A vector does not hold the parameters of the model.
        """
        loaded = [self._load(term) for term in terms]
        for name, parameter in self._parameters.items():
            factors = ((vector[name], term.factor(name)) for vector, term in zip(loaded, terms, strict=True))
            parts = [(delta, factor) for delta, factor in factors if factor != 0]
            parameter.copy_(combine(self._onto[name], parts, parameter.dtype) if parts else self._onto[name])

    def restore(self) -> None:
        """Give the model its own weights back."""
        self.apply([])

    def _load(self, term: Term) -> dict[str, Tensor]:
        # Vectors that differ in coefficients only share one source.
        key = id(term.vector.tensors)
        if key not in self._vectors:
            lone = set(term.vector) ^ set(self._parameters)
            if lone:
                raise LayoutMismatchError(
                    f"{term.vector.label} does not hold the parameters of the model; on one side only are {first_three(lone)}"
                )
            self._vectors[key] = dict(term.vector)
        return self._vectors[key]


def best_scale(scores: Mapping[float, float]) -> float:
    """The scale of the highest score; of equal ones the smallest, which changes the model least.

    Raises:
        LataError: There is no score.
    """
    if not scores:
        raise LataError("there is no scale to choose from: score at least one")
    return min(scores, key=lambda scale: (-scores[scale], abs(scale)))


def scale_for_residual(residual_at: Callable[[float], float], scales: Sequence[float], wanted: float, halvings: int = 6) -> ResidualSearch:
    """The smallest scale at which a residual has fallen to a wanted value.

    The scales are tried in order until one reaches the value; the interval before it is then halved.

    Args:
        residual_at: What is left of the unwanted skill at a scale.
        scales: Rising, at least two; the first is where forgetting starts from.
        wanted: The residual to reach, in the same unit.
        halvings: Of the interval between the last scale that does not reach the value and the first that does.

    Returns:
        The scale (None if no scale tried reaches the value) and everything that was tried on the way.

    Raises:
        LataError: Fewer than two scales, or scales that do not rise.
    """
    if len(scales) < 2 or any(left >= right for left, right in pairwise(scales)):
        raise LataError(f"forgetting needs at least two rising scales to search, got {list(scales)}")
    tried: dict[float, float] = {}
    previous = scales[0]
    for scale in scales:
        tried[scale] = residual_at(scale)
        if tried[scale] <= wanted:
            break
        previous = scale
    else:
        return ResidualSearch(None, tried)
    left, right = previous, scale
    for _ in range(halvings if left < right else 0):
        middle = (left + right) / 2
        tried[middle] = residual_at(middle)
        left, right = (left, middle) if tried[middle] <= wanted else (middle, right)
    return ResidualSearch(right, tried)
