"""The keys under which a measurement is logged."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lata_lightning.live.history import MeasuredStep


def metrics_of(name: str, measured: MeasuredStep) -> dict[str, float]:
    """Return the figures of a measurement by the keys they are logged under.

    Args:
        name: The figures of the model go to ``{name}/{figure}``, those of the layers to ``{name}_layers/{figure}/{layer}``. Numbers in names of layers
            are padded with zeros, as many loggers sort by letters.
        measured: The measurement.
    """
    metrics = {f"{name}/{figure}": value for figure, value in measured.figures.items()}
    padded = padded_names(measured.alignment.layers)
    for figure, values in measured.layers().items():
        metrics |= {f"{name}_layers/{figure}/{padded[layer]}": value for layer, value in values.items()}
    return metrics


def padded_names(layers: Iterable[str]) -> dict[str, str]:
    """Return each name of a layer with its numbers padded with zeros to the length of the longest, so that names sort as layers do."""
    listed = list(layers)
    digits = max((len(number) for layer in listed for number in re.findall(r"\d+", layer)), default=0)
    return {layer: re.sub(r"\d+", lambda number: number[0].zfill(digits), layer) for layer in listed}
