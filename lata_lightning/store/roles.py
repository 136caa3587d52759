"""The role of a tensor in its model: a weight, a statistic that training updates, or a table that follows from the config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from lata_lightning.store.checkpoint_names import state_of, under_checkpoint_names
from lata_lightning.store.meta_model import meta_model

Role = Literal["weight", "state", "table", "integers"]
"""``weight``: trained by gradients. ``state``: updated while a model trains, as the statistics of batch norms. ``table``: computed by the model itself, as
rotary frequencies, position numbers and causal masks. ``integers``: integers of unknown role."""

_STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")
_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
_TABLE = re.compile(r"(^|\.|_)(original_)?inv_freq$|(^|\.)(cos|sin)_cached$|(^|\.)position_ids$|(^|\.)(attn|attention)\.masked_bias$")
# The causal mask of GPT-2 and GPT-NeoX.
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_PARAMETER = re.compile(r"(^|\.)(weight|bias)$")


def named_role(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Role | None:
    """Return the role of a tensor by its name; None where the name does not tell."""
    if _TABLE.search(name) or (_CAUSAL_MASK.search(name) and len(shape) == 4):
        return "table"
    if _STATISTIC.search(name) or _COUNTER.search(name):
        return "state"
    return "weight" if _PARAMETER.search(name) and dtype.is_floating_point else None


def is_counter(name: str) -> bool:
    """Return whether a tensor counts batches, which changes nothing that a model computes."""
    return _COUNTER.search(name) is not None


def is_variance(name: str) -> bool:
    """Return whether a tensor is a running variance."""
    return name.endswith("running_var")


def buffer_names(module: nn.Module) -> frozenset[str]:
    """Return the names, in a checkpoint, of the saved buffers of a module."""
    buffers = {name: tensor for name, tensor in state_of(module).items() if not isinstance(tensor, nn.Parameter)}
    return frozenset(buffers) | frozenset(under_checkpoint_names(module, buffers))


def roles_of(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    modules: Iterable[nn.Module] = (),
    config: Mapping[str, object] | None = None,
) -> dict[str, Role]:
    """Return the role of each tensor.

    Args:
        tensors: Name, shape and dtype of each.
        modules: Modules with these tensors, if there are any: their buffers are no weights.
        config: Config of the model; its meta model is built only if a name does not tell the role.

    Returns:
        Role by name. Floating tensors of unknown role are weights.
    """
    listed = list(tensors)
    by_name = {name: named_role(name, shape, dtype) for name, shape, dtype in listed}
    known = [buffer_names(module) for module in modules]
    if not known and config is not None and None in by_name.values():
        module = meta_model(config)
        known = [] if module is None else [buffer_names(module)]
    buffers = frozenset().union(*known)
    roles: dict[str, Role] = {}
    for name, _, dtype in listed:
        role = by_name[name]
        if role in (None, "weight") and name in buffers:
            role = "state"
        roles[name] = role or ("weight" if dtype.is_floating_point else "integers")
    return roles
