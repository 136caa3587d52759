"""Rules that turn alignments into coefficients.

A layer that is well aligned with instruction following gets a small coefficient, a layer that is not gets a large one. Layers are ranked by
falling alignment, rank 1 for the highest; equal alignments are ranked in layer order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from lata_lightning.alignment import Alignment
from lata_lightning.errors import WeightingError, first_three

Weighting = Literal["linear", "log", "threshold", "none"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
# Coefficients may also come from samples instead of alignments (``lata_lightning.linearity``); then this stands in the place of the rule.
CLOSED_FORM: Literal["closed-form"] = "closed-form"
Origin = Literal["linear", "log", "threshold", "none", "closed-form"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)
DEFAULT_THRESHOLD = 0.95


def linear_drop_by_rank(alignment: Alignment | Mapping[str, float]) -> dict[str, float]:
    """Coefficient r / L by layer, r the layer's rank among L.

    Args:
        alignment: A measurement, or alignment by layer in layer order.

    Returns:
        Dimensionless, in [1/L, 1], in layer order; 1 for a single layer.

    Raises:
        WeightingError: An alignment is undefined, or there is no layer.

    Source: LATA, arXiv:2502.20186, Linear-Drop-by-Rank.
    """
    ranks = _ranks(alignment)
    return {layer: rank / len(ranks) for layer, rank in ranks.items()}


def log_drop_by_rank(alignment: Alignment | Mapping[str, float]) -> dict[str, float]:
    """Coefficient log r / log L by layer, r the layer's rank among L.

    Args:
        alignment: A measurement, or alignment by layer in layer order.

    Returns:
        Dimensionless, in [0, 1], in layer order: 0 for the best aligned layer, 1 for the worst. For a single layer log 1 / log 1 is undefined;
        it gets 1, as a layer that cannot be compared to another is kept.

    Raises:
        WeightingError: An alignment is undefined, or there is no layer.

    Source: LATA, arXiv:2502.20186, Logarithmic-Drop-by-Rank.
    """
    ranks = _ranks(alignment)
    if len(ranks) == 1:
        return dict.fromkeys(ranks, 1.0)
    return {layer: math.log(rank) / math.log(len(ranks)) for layer, rank in ranks.items()}


def drop_with_threshold(alignment: Alignment | Mapping[str, float], threshold: float = DEFAULT_THRESHOLD) -> dict[str, float]:
    """Coefficient 0 for layers whose alignment reaches the threshold, 1 for the others.

    Args:
        alignment: A measurement, or alignment by layer.
        threshold: Dimensionless, in [-1, 1].

    Returns:
        0 or 1 by layer, in layer order.

    Raises:
        WeightingError: An alignment is undefined, there is no layer, or the threshold is out of range.

    Source: LATA, arXiv:2502.20186, Drop-with-Threshold; used there for forgetting.
    """
    if not -1 <= threshold <= 1:
        raise WeightingError(f"threshold must be a cosine, in [-1, 1], got {threshold}")
    return {layer: 0.0 if value >= threshold else 1.0 for layer, value in _values(alignment).items()}


def coefficients(alignment: Alignment, weighting: Weighting, threshold: float = DEFAULT_THRESHOLD) -> dict[str, float]:
    """Coefficient by layer under a rule given by name; ``"none"`` gives 1 to every layer.

    Raises:
        WeightingError: The rule is unknown, or cannot be applied to this alignment.
    """
    check_weighting(weighting)
    if weighting == "linear":
        return linear_drop_by_rank(alignment)
    if weighting == "log":
        return log_drop_by_rank(alignment)
    if weighting == "threshold":
        return drop_with_threshold(alignment, threshold)
    return dict.fromkeys(alignment.layers, 1.0)


def check_weighting(weighting: str) -> Weighting:
    """The rule's name itself; an error that lists the choices if there is no such rule."""
    if weighting not in WEIGHTINGS:
        raise WeightingError(f"unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    return weighting


def _values(alignment: Alignment | Mapping[str, float]) -> dict[str, float]:
    if isinstance(alignment, Alignment):
        if alignment.undefined:
            raise WeightingError(
                f"the alignment is undefined in {first_three(alignment.undefined)} of {len(alignment.layers)} layers, because the instruction "
                "vector is zero there, so they cannot be ranked. Use a coarser level, or the weighting 'none'."
            )
        values = alignment.values
    else:
        values = dict(alignment)
    if not values:
        raise WeightingError("there is no layer to weight: no tensor belongs to a block. Give the rule that names the blocks (layers=…).")
    unusable = [layer for layer, value in values.items() if not math.isfinite(value)]
    if unusable:
        raise WeightingError(f"alignments must be finite numbers; they are not in {first_three(unusable)}")
    return values


def _ranks(alignment: Alignment | Mapping[str, float]) -> dict[str, int]:
    values = _values(alignment)
    # sorted() is stable, so equal alignments keep the order of the layers.
    falling = sorted(values, key=lambda layer: -values[layer])
    rank_of = {layer: rank for rank, layer in enumerate(falling, start=1)}
    return {layer: rank_of[layer] for layer in values}
