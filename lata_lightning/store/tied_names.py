"""Groups of names that are one tensor in a model, as a task vector records them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import nn

from lata_lightning.store.checkpoint_names import checkpoint_name_of, tied_groups

TiedNames = tuple[tuple[str, ...], ...]


def ties_of(module: nn.Module, names: Container[str]) -> TiedNames:
    """Groups of names that are one tensor of a module, each group with at least one of the given names.

    Args:
        module: The model; meta tensors suffice.
        names: Names of tensors as a checkpoint of the model has them.
    """
    saved = checkpoint_name_of(module)
    return _kept(([saved.get(name, name) for name in group] for group in tied_groups(module)), names)


def ties_by_alias(aliases: Mapping[str, str], names: Container[str]) -> TiedNames:
    """The same groups from other names of tensors: alias to the name that a source lists."""
    groups: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        groups.setdefault(name, [name]).append(alias)
    return _kept(groups.values(), names)


def _kept(groups: Iterable[list[str]], names: Container[str]) -> TiedNames:
    return tuple(tuple(sorted(group)) for group in groups if len(group) > 1 and any(name in names for name in group))
