"""Other weights under the names of the model in training: its start on disk, or an instruction vector."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from lata_lightning.errors import LayoutMismatchError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.placements.region import Region
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.pairing import pair
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import View


def matched_to(live: LiveModel, source: TensorSource, what: str, root: nn.Module, leave_out: LeaveOut = NOTHING) -> TensorSource:
    """Return a source under the names of the live model.

    Args:
        live: The model in training.
        source: Has the same parameters. Buffers may be on one side only.
        what: What the source is, for messages: ``"the start weights /path"``.
        root: The module that is trained, in which an error may name the model that is meant.
        leave_out: What the source need not have.

    Raises:
        LayoutMismatchError: The source lacks a parameter, or has it in another shape.
    """
    weights = {name: name for name in live.names if name not in live.buffers}
    try:
        matched, other = pair(live, source, leave_out)
    except LayoutMismatchError as error:
        try:
            matched, other = pair(
                View(live, weights), View(source, {name: name for name in source.names if name not in live.buffers}), leave_out
            )
        except LayoutMismatchError:
            raise LayoutMismatchError(f"{what} must fit the model in training: {error}{_advice(live, source, root)}") from error
    names = {matched.origin_name(name): name for name in matched.names}
    missing = [name for name in weights if name not in names and not leave_out(name)]
    if missing:
        raise LayoutMismatchError(
            f"{what} must have every parameter of the model in training; it lacks {first_three(missing)}.{_advice(live, source, root)}"
        )
    return View(other, names)


def stored_part(source: TensorSource, name: str, region: Region | None = None) -> Tensor | LowRank:
    """Return a tensor as a source stores it, or the part of it that a process has.

    Args:
        source: Tensors under the names of the live model.
        name: The tensor.
        region: The part; by default all of the tensor, which then may come as factors.
    """
    if region is not None and not (region.is_whole and region.shape == source.shape(name)):
        return region.read(source, name)
    return source.low_rank(name) or source.read(name)


def _advice(live: LiveModel, source: TensorSource, root: nn.Module) -> str:
    """Say what to do about a layout that does not fit, where that can be told; begins with a space."""
    wanted = set(source.names)
    below: Counter[str] = Counter()
    for name in live.names:
        parts = name.split(".")
        below.update(".".join(parts[:cut]) for cut in range(1, len(parts)) if ".".join(parts[cut:]) in wanted)
    path, count = max(below.items(), key=lambda item: item[1], default=("", 0))
    if 2 * count > len(wanted):
        above = next((unwrapped(path) for path, module in root.named_modules() if module is live.module), "")
        return (
            f" {count} of its {len(wanted)} tensors are those below {path!r}: name that model with model={f'{above}.{path}'.strip('.')!r}."
        )
    grown = [
        name
        for name in live.names
        if name in wanted and len(live.shape(name)) == 2 and live.shape(name)[1:] == source.shape(name)[1:] != live.shape(name)
    ]
    grown = [name for name in grown if live.shape(name)[0] != source.shape(name)[0]]
    if grown:
        return (
            f" Where training added tokens, resize the other side alike and save it, or leave these tensors out of the measurement: "
            f"leave_out={sorted(grown)!r}."
        )
    return ""
