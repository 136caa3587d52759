"""The form in which a model has its parameters: what must not change once the start weights are captured."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.placements.region import Region
from lata_lightning.live.ranks import Ranks

Form = Mapping[str, tuple[torch.dtype, Region]]
"""Precision of each parameter, and the range of it that this process has."""


def form_of(live: LiveModel) -> Form:
    """Return the form of a model; of buffers and of packed weights there is none."""
    return {
        name: (live.dtype(name), live.placement(name).region)
        for name in live.names
        if name not in live.buffers and name not in live.quantised
    }


def check_form(before: Form, live: LiveModel, ranks: Ranks) -> None:
    """Refuse a model of another form than it had when its start weights were captured.

    Raises:
        LataError: Its parameters have other names, another precision, or are spread over the processes in another way.
    """
    now = form_of(live)
    advice = "Give the model its final form first (cast, wrap and shard it, set up the process group), then make the monitor."
    if Ranks().world != ranks.world:
        raise LataError(
            f"the number of processes changed from {ranks.world} to {Ranks().world} after the start weights were captured. {advice}"
        )
    other = set(before) ^ set(now)
    if other:
        raise LataError(
            f"the model has other parameters than when its start weights were captured; only before or only now: {first_three(other)}. Measure before "
            "adapters are merged or layers are replaced."
        )
    cast = [name for name, (dtype, _) in now.items() if dtype != before[name][0]]
    if cast:
        raise LataError(f"the model was cast to another precision after its start weights were captured: {first_three(cast)}. {advice}")
    moved = [name for name, (_, region) in now.items() if region != before[name][1]]
    if moved:
        raise LataError(f"the model was sharded in another way after its start weights were captured: {first_three(moved)}. {advice}")
