"""Heads of classifiers that belong to one task: which tensors of a model in training its start does not have."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lata_lightning.errors import LataError
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.placements.ownership import Ownership
from lata_lightning.live.ranks import Ranks
from lata_lightning.store.head_files import HEAD_TENSORS, Head
from lata_lightning.store.names import LeaveOut, leave_out_pattern
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import match, unmatched

_CLASSIFIERS = ("SEQUENCE", "IMAGE", "TOKEN", "AUDIO", "VIDEO")


class NewHead(NamedTuple):
    """A head that training begins with random values.

    Attributes:
        names: Its tensors, as a checkpoint of the model in training names them.
        beside: Tensors that only the start has, such as another head.
        patterns: Regular expressions that match both, for vectors without them.
        unknown: Why it cannot be told whether the head is new; empty where it can.
    """

    names: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    unknown: str = ""

    def describe(self) -> str:
        """Say what becomes of the head, for the log; empty where there is nothing to say."""
        if self.unknown:
            return f"it cannot be told whether the head is new, so it is part of the task vector: {self.unknown}. If it is new, leave it out: leave_out=…"
        if not self.names:
            return ""
        count = f"{len(self.names)} tensor{'s' if len(self.names) > 1 else ''}"
        return (
            f"the head is new ({count}, first: {self.names[0]}): it stays out of the task vector and is saved beside it as {HEAD_TENSORS}"
        )

    def modules(self, every: Iterable[str]) -> list[str]:
        """Return the paths of the modules that have nothing but tensors of the head; ``every`` are the names of all tensors of the model."""
        shared = {prefix for name in set(every) - set(self.names) for prefix in _prefixes(name)}
        return sorted({next((prefix for prefix in _prefixes(name) if prefix not in shared), name) for name in self.names})


NO_HEAD = NewHead()


def new_head(live: LiveModel, start: str | None = None) -> NewHead:
    """Return which tensors of a classifier of transformers are new: its start lacks them, or has them outside the encoder in another shape.

    Args:
        live: The model in training, with nothing left out. Only names and shapes are looked at.
        start: Where the start weights lie; by default where the model says that it was loaded from.

    Returns:
        The head; ``NO_HEAD`` for a model that is no classifier, whose start is unknown, or that differs from its start in more than a head.
    """
    location = start or live.location
    if location is None or not is_classifier(live.module):
        return NO_HEAD
    try:
        source = open_source(location)
        beside, new = unmatched(source, live)
        paired = match(source, live, LeaveOut(names=beside | new))
    except LataError as error:
        return NewHead(unknown=str(error).rstrip("."))
    for name in paired.start.names:
        own = paired.tuned.origin_name(name)
        if paired.start.shape(name) != paired.tuned.shape(name) and not own.startswith(_encoder(live)):
            beside, new = beside | {paired.start.origin_name(name)}, new | {own}
    others = [name for name in live.names if name not in new]
    # Anything else than a few modules outside the layers is no head.
    if leave_out_pattern(new, others) is None:
        return NO_HEAD
    patterns = dict.fromkeys(_pattern(name.removeprefix(_encoder(live)), name, others) for name in sorted(beside | new))
    return NewHead(tuple(sorted(new)), tuple(sorted(beside)), tuple(patterns))


def is_classifier(module: nn.Module) -> bool:
    """Whether a module is a classifier of transformers: one label for each text, image or token."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    from transformers.models.auto import modeling_auto

    known: set[str] = set()
    for kind in _CLASSIFIERS:
        names: Mapping[str, str | tuple[str, ...]] = getattr(modeling_auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES")
        for entry in names.values():
            known.update((entry,) if isinstance(entry, str) else entry)
    return any(base.__name__ in known for base in type(module).__mro__)


def head_of(live: LiveModel, new: Collection[str], start: str | None) -> Head | None:
    """Return the head of a classifier as it is now, whole and on the CPU of rank zero. Every process has to call this.

    Args:
        live: The model in training, in which the head is left out.
        new: Tensors of a new head; what is left out besides belongs to the head if it lies outside the encoder.
        start: Where the start weights lie.

    Returns:
        The head; None where nothing of it is left out.
    """
    names = (
        [name for name in sorted(live.left_out) if name in new or not name.startswith(_encoder(live))] if is_classifier(live.module) else []
    )
    if not names:
        return None
    placements = {name: live.left_out[name] for name in names}
    ownership = Ownership(placements, Ranks())
    tensors = {name: ownership.gather(name, part.values(), part.shape, part.dtype) for name, part in placements.items()}
    config: Mapping[str, Any] = live.config or {}
    count = int(getattr(getattr(live.module, "config", None), "num_labels", 0))
    numbered = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    labels = tuple(numbered.get(number, f"LABEL_{number}") for number in range(count))
    named = any(label != f"LABEL_{number}" for number, label in enumerate(labels))
    return Head(tensors, str(config.get("model_type")), type(live.module).__name__, count, labels if named else None, start)


def _encoder(live: LiveModel) -> str:
    """Return what the names of all tensors of the encoder in a classifier of transformers begin with."""
    return f"{live.module.base_model_prefix}."


def _pattern(short: str, name: str, others: Collection[str]) -> str:
    """Return a pattern for a tensor that also matches under another prefix, unless that would match a tensor to keep."""
    pattern = rf"(^|\.){re.escape(short)}$"
    return rf"^{re.escape(name)}$" if any(re.search(pattern, other) for other in others) else pattern


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:cut]) for cut in range(1, len(parts))]
