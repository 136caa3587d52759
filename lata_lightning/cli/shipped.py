"""Shipped recipes, checkpoints and data, by names that work in any directory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lata_lightning.errors import LataError, nearest

_PACKAGE = Path(str(files("lata_lightning")))
RECIPES = _PACKAGE / "recipes"
_FOLDERS = {"quickstart": _PACKAGE / "quickstart" / "checkpoints", "recipes": RECIPES / "data"}


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def recipe(name: str) -> str:
    """Return the path of a shipped recipe by its name, which may end in ``.yaml``; existing files and other paths are returned unchanged.

    Raises:
        LataError: The name is not a path, and there is no such recipe.
    """
    if Path(name).is_file() or "/" in name or "\\" in name:
        return name
    known = recipes()
    path = known.get(name.removesuffix(".yaml"))
    if path is None:
        raise LataError(f"there is no file {name}, and no recipe of that name{nearest(name, known)} The recipes are {', '.join(known)}.")
    return str(path)


def located(value: Any) -> Any:
    """Return the arguments with every ``quickstart:NAME`` and ``recipes:NAME`` replaced by the path of that checkpoint or data file.

    Raises:
        LataError: There is nothing of that name.
    """
    if isinstance(value, str):
        return _path(value)
    if isinstance(value, Namespace):
        for key, entry in list(vars(value).items()):
            setattr(value, key, located(entry))
        return value
    if isinstance(value, Mapping):
        return {key: located(entry) for key, entry in value.items()}
    return type(value)(map(located, value)) if type(value) in (list, tuple) else value


def as_typed(path: str) -> str:
    """The short name of a checkpoint or data file that the package ships; any other path as it is. The inverse of ``located``."""
    folders = {folder: kind for kind, folder in _FOLDERS.items()}
    kind = folders.get(Path(path).parent)
    return path if kind is None else f"{kind}:{Path(path).name}"


def summary(path: Path) -> str:
    """Return the purpose of a recipe: its first sentences, up to the commands."""
    return path.read_text("utf-8").split("\n", 1)[0].lstrip("# ").rstrip(":")


def _path(text: str) -> str:
    kind, colon, name = text.partition(":")
    if not colon or kind not in _FOLDERS:
        return text
    # By comparing names: nothing in a name becomes part of a path.
    known = {path.name: path for path in sorted(_FOLDERS[kind].iterdir()) if not path.name.startswith((".", "_"))}
    if name not in known:
        raise LataError(f"the package ships no {text}{nearest(name, known)} There are {', '.join(f'{kind}:{name}' for name in known)}.")
    return str(known[name])
