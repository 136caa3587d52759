"""Groups of names that are one tensor in a model, as a task vector records them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import nn

from lata_lightning.store.checkpoint_names import checkpoint_name_of, tied_groups

TiedNames = tuple[tuple[str, ...], ...]


def ties_of(module: nn.Module, names: Container[str], groups: Iterable[Iterable[str]] | None = None) -> TiedNames:
    """Return the groups of names that are one tensor of a module, each group with at least one of the given names.

    Args:
        module: The model; meta tensors suffice.
        names: Names of tensors as a checkpoint of the model has them.
        groups: Names in the module that are one tensor, where it does not show in the module.
    """
    saved = checkpoint_name_of(module)
    return _with_names(([saved.get(name, name) for name in group] for group in (tied_groups(module) if groups is None else groups)), names)


def ties_by_alias(aliases: Mapping[str, str], names: Container[str]) -> TiedNames:
    """Return the groups of tied names from a mapping of alias to the name that a source lists, each group with at least one of the given names."""
    groups: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        groups.setdefault(name, [name]).append(alias)
    return _with_names(groups.values(), names)


def _with_names(groups: Iterable[list[str]], names: Container[str]) -> TiedNames:
    return tuple(tuple(sorted(group)) for group in groups if len(group) > 1 and any(name in names for name in group))
