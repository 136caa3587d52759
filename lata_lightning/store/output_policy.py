"""Whether finished output may replace an earlier one, and whether anything is written at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lata_lightning.errors import OutputError
from lata_lightning.store.directories import MANIFEST_NAME, MERGE_RECORD

_WRITTEN_HERE = (MANIFEST_NAME, MERGE_RECORD, "reconstruction.json", "coefficients.json", "merge.yaml", "tune.json")
"""Files by which a directory that a command has written is recognised: vector, model, adapter, table, mergekit's input, scales."""


@dataclass(frozen=True)
class OutputPolicy:
    """What writers may do to the place they write to.

    Attributes:
        overwrite: Replace earlier output, which goes only when the new one is whole.
        dry_run: Raise ``DryRun`` where writing would begin.
        inputs: Paths that are read, which no output may replace.
    """

    overwrite: bool = False
    dry_run: bool = False
    inputs: tuple[Path, ...] = ()


class DryRun(Exception):  # noqa: N818  (no error: it ends a dry run as planned)
    """Raised in a dry run in the place of writing, when everything has been checked.

    Attributes:
        path: What would be written.
        size: Bytes of tensors and companion files; None where they are not known before the work is done.
        applied: Sentences about the coefficients that would be applied.
        reads: What would be read, as far as the command line does not say so.
    """

    def __init__(self, path: Path, size: int | None = None, applied: Sequence[str] = (), reads: Sequence[str] = ()) -> None:
        super().__init__(f"{path} would be written")
        self.path, self.size, self.applied, self.reads = path, size, tuple(applied), tuple(reads)


_NORMAL = OutputPolicy()
_POLICY: ContextVar[OutputPolicy] = ContextVar("output_policy", default=_NORMAL)


@contextmanager
def output_policy(policy: OutputPolicy) -> Iterator[None]:
    """Put a policy in force for everything that is written in the block."""
    before = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(before)


def end_dry_run(path: Path, size: int | None = None, reads: Sequence[str] = ()) -> None:
    """End a dry run, before anything is written and before work that would take long; without one, do nothing.

    Raises:
        DryRun: A dry run is in force.
    """
    if _POLICY.get().dry_run:
        raise DryRun(path, size, reads=reads)


def overwriting() -> bool:
    """Whether earlier output may be replaced."""
    return _POLICY.get().overwrite


def may_replace_file(path: Path) -> bool:
    """Whether the policy lets a file be replaced.

    Raises:
        OutputError: The file is one of the inputs.
    """
    return _POLICY.get().overwrite and path.is_file() and not path.is_symlink() and _is_no_input(path)


def written_here(path: Path) -> bool:
    """Whether a command of lata has written a directory, by the files it holds."""
    return any((path / name).is_file() for name in _WRITTEN_HERE)


def may_replace_directory(path: Path) -> bool:
    """Whether the policy lets a directory be replaced that is not empty.

    Raises:
        OutputError: It holds one of the inputs, or is nothing that a command has written.
    """
    if not _POLICY.get().overwrite:
        return False
    if not written_here(path):
        raise OutputError(
            f"--overwrite replaces what lata has written, and {path} is nothing of that kind: it holds none of {', '.join(_WRITTEN_HERE)}. "
            "Choose another output path, or remove it yourself."
        )
    return _is_no_input(path)


@contextmanager
def set_aside(path: Path, written: Callable[[], bool] = lambda: False) -> Iterator[Path | None]:
    """Where the policy says to overwrite, keep an earlier directory beside its place for as long as the block writes a new one there.

    For output that is written over minutes or days, and that is worth keeping if it is broken off.

    Args:
        path: The directory. The caller has made sure that it may be replaced.
        written: Whether what a block that failed has left is worth keeping; then both stay, otherwise the earlier directory gets its name back.

    Yields:
        Where the earlier directory is; None where there is none, or nothing is to be replaced.
    """
    if not _POLICY.get().overwrite or not path.is_dir():
        yield None
        return
    aside = next(place for number in count(1) if not (place := path.with_name(f"{path.name}.before-{number}")).exists())
    path.rename(aside)
    try:
        yield aside
    except BaseException:
        if not written():
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
        raise
    shutil.rmtree(aside)


def _is_no_input(path: Path) -> bool:
    target = path.resolve()
    read = [str(given) for given in _POLICY.get().inputs if target in (given.resolve(), *given.resolve().parents)]
    if read:
        raise OutputError(f"{path} cannot be overwritten, as {read[0]} is read from it. Choose another output path.")
    return True
