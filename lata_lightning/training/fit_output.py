"""The output directory of `lata fit`: whether a run may start in it, where to resume, and cleaning up after a failed start."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from lata_lightning.errors import LataError, first_three
from lata_lightning.store.output_policy import overwriting

CHECKPOINTS, LOGS = "checkpoints", "logs"
_LAST = "last"
# Files that Lightning and its loggers write before the first step.
_WRITTEN_AT_START = {"config.yaml", "hparams.yaml"}


def newest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint of a run that was written last; None if there is none."""
    checkpoints = [path for path in (output / CHECKPOINTS).glob("*.ckpt") if path.exists()]
    return max(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def checkpoint_to_resume(output: Path, given: str | None, results: Sequence[Path], command: Sequence[str]) -> str | None:
    """Return the checkpoint to resume from, before a model is loaded.

    Args:
        output: The directory of the run.
        given: The option ``--ckpt_path``: a path, ``last``, another keyword of Lightning, or None.
        results: The directories that a finished run has written.
        command: The command line, for the message that says how to resume.

    Returns:
        ``given``; for ``last`` the newest checkpoint of the run, or None where it has none yet, so that the run begins anew.

    Raises:
        LataError: The directory holds a finished run, or an unfinished one with a checkpoint to resume from; or the given checkpoint does not exist.
    """
    newest = newest_checkpoint(output)
    if given == _LAST:
        return str(newest) if newest is not None else None
    if given is not None:
        if Path(given).suffix and "://" not in given and not Path(given).exists():
            other = f"the newest of this run is {newest}" if newest is not None else f"{output / CHECKPOINTS} holds none"
            raise LataError(f"--ckpt_path must be a checkpoint, and {given} does not exist; {other}.")
        return given
    finished = [path for path in results if path.exists()]
    if finished:
        raise LataError(
            f"{output} holds a finished run ({finished[0]}). Choose another directory with --output, or remove it. To train it further, give its "
            f"checkpoint with --ckpt_path and a larger --trainer.max_epochs."
        )
    if newest is not None:
        raise LataError(
            f"{output} holds an unfinished run with the checkpoint {newest.name}. Go on with it: lata {shlex.join(command)} --ckpt_path last. To begin "
            "anew, choose another directory with --output, or remove it."
        )
    return None


def may_replace_run(output: Path, resumed: str | None, parts: Sequence[str]) -> bool:
    """Whether the output policy lets an earlier run in a directory be replaced.

    Args:
        output: The directory of the run.
        resumed: The option ``--ckpt_path``.
        parts: Names of what a run leaves in it.

    Raises:
        LataError: It may, but the directory holds something that no run leaves, or the run is to go on from a checkpoint.
    """
    if not overwriting() or not output.is_dir():
        return False
    if resumed is not None:
        raise LataError("--overwrite begins a run anew, and --ckpt_path goes on with one: leave one of them out")
    others = [path.name for path in output.iterdir() if path.name not in parts]
    if others:
        raise LataError(
            f"--overwrite replaces a run, and {output} also holds {first_three(others)}. Move that elsewhere, or choose another --output."
        )
    return True


def log_folders(output: Path) -> set[Path]:
    """Return the folders of the loggers, one for each start of the run."""
    return set((output / LOGS).glob("version_*"))


def remove_failed_start(output: Path, before: set[Path]) -> None:
    """Remove the folders of a start that failed before it logged anything.

    Args:
        output: The directory of the run.
        before: The log folders that existed before the start.
    """
    for folder in log_folders(output) - before:
        if {path.name for path in folder.iterdir()} <= _WRITTEN_AT_START:
            shutil.rmtree(folder, ignore_errors=True)
    empty = [path for path in output.glob("*") if path.is_dir() and not any(path.iterdir())]
    for path in [*empty, output]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
