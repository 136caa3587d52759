"""What every format provides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lata_lightning.errors import SourceError

if TYPE_CHECKING:
    from lata_lightning.store.sources import Origin, TensorSource


class Format(NamedTuple):
    """One kind of file or directory with weights. Its module needs no torch before ``open`` is called.

    Attributes:
        name: What it is called in messages, such as ``"safetensors file"``.
        recognise: Returns whether a path is of this kind, by its content.
        open: Returns its tensors. The second argument tells the path or hub id by which it was named, the third the name of the module that is meant
            (None for the whole).
        inspect: Returns facts about it as plain types, from headers alone; the second argument is the name of the module to describe, or None.
        verify: Compares its tensors with the recorded hashes, and returns their number.
    """

    name: str
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Origin, str | None], TensorSource]
    inspect: Callable[[Path, str | None], dict[str, Any]]
    verify: Callable[[Path], int]


def without_hashes(name: str) -> Callable[[Path], int]:
    """Return the ``verify`` of a format that records no hashes, which refuses."""

    def verify(path: Path) -> int:
        raise SourceError(
            f"{path} is a {name}, with no hashes to compare with. Task vectors and merged models have some, in task_vector.json and merge.json."
        )

    return verify


def not_read(name: str, recognise: Callable[[Path], bool], advice: str) -> Format:
    """Return a format that is recognised and refused.

    Args:
        name: What it is called.
        recognise: Returns whether a path is of this kind.
        advice: What to do instead, a sentence; ``{path}`` in it becomes the path.
    """

    def refuse(path: Path, origin: Origin | None = None, model: str | None = None) -> NoReturn:
        raise SourceError(f"{path if origin is None else origin.location} is a {name}, which is not read here. {advice.format(path=path)}")

    def inspect(path: Path, model: str | None) -> dict[str, Any]:
        return {"holds": f"{name}, which is not read here", "what to do": advice.format(path=path)}

    return Format(name, recognise, refuse, inspect, refuse)
