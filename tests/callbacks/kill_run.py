"""Fits that are killed at one file operation after another, and resumed; started by a test: python kill_run.py DIRECTORY

The n-th run gets SIGKILL just before its n-th operation on a file of the callback, in a process of its own. What then lies there is copied to
``DIRECTORY/run-n/killed``. Then the run is started again: from last.ckpt if there is one, else from scratch with a new output directory. The last
run is not killed at all.
"""

import os
import shutil
import signal
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from conformance import fit, same_batches
from lightning.pytorch.callbacks import ModelCheckpoint

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}


def run(directory, models, output, resume=None):
    # The only checkpoint is that of step 3 of 4, so a run that is killed later has something left to do.
    kept = ModelCheckpoint(directory, filename="kept", save_last=True, every_n_train_steps=3)
    lata = {"output_dir": directory / output}
    fit(directory, models, after=[kept], lata=lata, data=same_batches(2), resume=resume, enable_checkpointing=True)


def in_a_process(work, kill_at=None):
    """Status of a process that does the work."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if kill_at is not None:
            kill_before(kill_at)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill_before(number):
    left = [number]

    def hook(event, arguments):
        if event in WATCHED and "/lata" in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for number in range(1, 200):
        directory = root / f"run-{number:03d}"
        if in_a_process(partial(run, directory, root / "models", "lata"), kill_at=number) == 0:
            directory.rename(root / "whole")
            break
        if (directory / "lata").exists():
            shutil.copytree(directory / "lata", directory / "killed")
        last = directory / "last.ckpt"
        output, resume = ("lata", last) if last.exists() else ("again", None)
        status = in_a_process(partial(run, directory, root / "models", output, resume))
        (directory / "outcome").write_text(f"{'resumed' if resume else 'again'} {status}")
