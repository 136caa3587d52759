"""The coefficients of a task vector, as its manifest records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError, WeightingError, first_three
from lata_lightning.layers import Level, check_level
from lata_lightning.vectors.manifest import Manifest
from lata_lightning.weighting import CLOSED_FORM, ORIGINS, Rule, Weighting, is_own_name, rule_name
from lata_lightning.weighting import coefficients as by_rule


def by_alignment(manifest: Manifest, alignment: Alignment, weighting: Weighting | Rule, threshold: float, outside: float) -> Manifest:
    """Return a manifest with the coefficients that a rule makes of an alignment (see ``TaskVector.weighted``)."""
    coefficients = by_rule(alignment, weighting, threshold)
    if weighting == "none":
        # Plain task arithmetic weights nothing, inside the layers or outside.
        outside = 1.0
    return replace(
        manifest,
        level=alignment.level,
        start=alignment.start,
        outside=outside,
        weighting=rule_name(weighting),
        threshold=threshold,
        coefficients=coefficients,
        alignment=alignment.with_coefficients(coefficients, outside),
        asked_for=True,
    )


def as_given(
    manifest: Manifest, label: str, coefficients: Mapping[str, float] | Rule, level: Level, outside: float, weighting: str | None
) -> Manifest:
    """Return a manifest with coefficients of one's own, after checking them (see ``TaskVector.with_coefficients``); the label is for messages."""
    check_level(level)
    measured = manifest.alignment
    if not isinstance(coefficients, Mapping):
        if measured is None or measured.level != level:
            raise WeightingError(
                f"{label} stores no alignment by {level} for the rule {rule_name(coefficients)!r}: "
                "measure one with align(), and give both to weighted()"
            )
        weighting, coefficients = weighting or rule_name(coefficients), by_rule(measured, coefficients)
    weighting = weighting or CLOSED_FORM
    if weighting not in ORIGINS and not is_own_name(weighting):
        raise WeightingError(
            f"coefficients cannot come from {weighting!r}; choose one of {', '.join(ORIGINS)}, or a name of your own of letters, digits and _ . -"
        )
    layers = set(manifest.layers.layers(level))
    if set(coefficients) != layers:
        raise LataError(
            f"there must be one coefficient for each {level} of {label}; on one side only are {first_three(set(coefficients) ^ layers)}"
        )
    odd = [layer for layer, number in coefficients.items() if not isfinite(number)]
    if odd or not isfinite(outside):
        raise LataError(f"coefficients must be finite numbers; they are not in {first_three(odd or ['outside'])}")
    if measured is not None:
        measured = measured.with_coefficients(coefficients if measured.level == level else None, outside)
    return replace(
        manifest,
        level=level,
        outside=outside,
        weighting=weighting,
        coefficients=dict(coefficients),
        alignment=measured,
        asked_for=True,
    )


def of_tensor(manifest: Manifest, name: str) -> float:
    """Return the coefficient of the layer that holds a tensor; 1 as long as no rule has been applied, and for buffers."""
    if manifest.coefficients is None or name in manifest.layers.statistics:
        return 1.0
    layer = manifest.layers.layer_of(name, manifest.level)
    return manifest.outside if layer is None else manifest.coefficients[layer]
