"""Weighting rules: from the alignment of each layer to its coefficient.

A layer that is well aligned with instruction following gets a small coefficient, other layers get larger ones. Layers are ranked by falling alignment,
rank 1 for the highest; equal alignments are ranked in layer order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from lata_lightning.alignment import Alignment
from lata_lightning.errors import WeightingError, first_three

Weighting = Literal["linear", "log", "threshold", "none"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
Rule = Callable[[Alignment], Mapping[str, float]]
"""A rule of your own: returns the coefficient of each layer, from a measurement."""
# Recorded as the rule of coefficients that come from samples instead of alignments (``lata_lightning.linearity``).
CLOSED_FORM: Literal["closed-form"] = "closed-form"
ORIGINS: tuple[str, ...] = (*WEIGHTINGS, CLOSED_FORM)
"""Names under which coefficients are recorded, besides those of your own rules."""
STORED: Literal["stored"] = "stored"
"""Use the coefficients that a vector stores, whatever rule they come from."""
_OWN_NAME = re.compile(r"[A-Za-z_][\w.-]*")
DEFAULT_THRESHOLD = 0.95


def linear_drop_by_rank(alignment: Alignment | Mapping[str, float]) -> dict[str, float]:
    """Return the coefficient r / L of each layer, with r its rank among L layers.

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
    """Return the coefficient log r / log L of each layer, with r its rank among L layers.

    Args:
        alignment: A measurement, or alignment by layer in layer order.

    Returns:
        Dimensionless, in [0, 1], in layer order: 0 for the best aligned layer, 1 for the worst. A single layer gets 1: log 1 / log 1 is undefined,
        and a layer that cannot be compared with another is kept whole.

    Raises:
        WeightingError: An alignment is undefined, or there is no layer.

    Source: LATA, arXiv:2502.20186, Logarithmic-Drop-by-Rank.
    """
    ranks = _ranks(alignment)
    if len(ranks) == 1:
        return dict.fromkeys(ranks, 1.0)
    return {layer: math.log(rank) / math.log(len(ranks)) for layer, rank in ranks.items()}


def drop_with_threshold(alignment: Alignment | Mapping[str, float], threshold: float = DEFAULT_THRESHOLD) -> dict[str, float]:
    """Return the coefficient 0 for layers whose alignment reaches the threshold, and 1 for the others.

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


def coefficients(alignment: Alignment, weighting: Weighting | Rule, threshold: float = DEFAULT_THRESHOLD) -> dict[str, float]:
    """Compute the coefficient of each layer under a rule.

    Args:
        alignment: A measurement.
        weighting: Name of a rule (``"none"`` gives 1 to every layer), or a function from the measurement to the coefficient of each layer.
        threshold: Used by the rule ``"threshold"``.

    Returns:
        Dimensionless, in layer order.

    Raises:
        WeightingError: The rule is unknown, cannot be applied to this alignment, or does not give one finite number for each layer.
    """
    if not isinstance(weighting, str):
        return _by_own_rule(alignment, weighting)
    check_weighting(weighting)
    if weighting == "linear":
        return linear_drop_by_rank(alignment)
    if weighting == "log":
        return log_drop_by_rank(alignment)
    if weighting == "threshold":
        return drop_with_threshold(alignment, threshold)
    return dict.fromkeys(alignment.layers, 1.0)


def check_weighting(weighting: str) -> Weighting:
    """Return the name of a rule itself.

    Raises:
        WeightingError: There is no such rule.
    """
    if weighting not in WEIGHTINGS:
        raise WeightingError(f"unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    return weighting


def rule_name(rule: Weighting | Rule) -> str:
    """Return the name under which a rule is recorded: its own, or that of the function.

    Raises:
        WeightingError: The rule is unknown, or is a function without a name, such as a lambda.
    """
    if isinstance(rule, str):
        return check_weighting(rule)
    named: Any = rule
    while isinstance(named, partial):
        named = named.func
    name = str(getattr(named, "__name__", type(named).__name__))
    if not is_own_name(name):
        raise WeightingError(
            f"a rule of your own is recorded by the name of its function, and {name!r} cannot be one: define it with def, under another name than "
            f"{', '.join((*ORIGINS, STORED))}"
        )
    return name


def is_own_name(name: str) -> bool:
    """Return whether a rule of your own may have this name."""
    return name not in (*ORIGINS, STORED) and _OWN_NAME.fullmatch(name) is not None


def follows_alignment(name: str) -> bool:
    """Return whether the recorded rule depends on the alignments; ``"none"`` and closed-form coefficients do not."""
    return name not in ("none", CLOSED_FORM)


def _by_own_rule(alignment: Alignment, rule: Rule) -> dict[str, float]:
    name, given = rule_name(rule), rule(alignment)
    if not isinstance(given, Mapping):
        raise WeightingError(f"the rule {name!r} must give a coefficient by layer, a mapping, and gave {type(given).__name__}")
    other = set(given) ^ set(alignment.layers)
    if other:
        raise WeightingError(
            f"the rule {name!r} must give one coefficient for each of the {len(alignment.layers)} layers; on one side only are {first_three(other)}"
        )
    odd = [layer for layer in alignment.layers if not _is_finite(given[layer])]
    if odd:
        raise WeightingError(f"the rule {name!r} must give finite numbers; it does not in {first_three(odd)}")
    return {layer: float(given[layer]) for layer in alignment.layers}


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except TypeError:
        return False


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
