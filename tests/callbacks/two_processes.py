"""Starts a script as two processes of one run, as torchrun does, and reads what they left."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lata_lightning import TaskVector, align


def start(directory, script, *arguments, module=None, **environment):
    """Run a script of this directory, or a module, on two processes, which write what they print below a directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    shared = {**os.environ, **environment, **run, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [
        sys.executable,
        "-W",
        "ignore",
        *(["-m", module] if module else [str(Path(__file__).with_name(script))]),
        *map(str, arguments),
    ]
    logs = [directory / f"log{rank}.txt" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        # One that fails leaves the other waiting.
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    assert not any(process.wait() for process in processes), "\n".join(log.read_text()[-3000:] for log in logs)


def history(output):
    return [json.loads(line) for line in (output / "lata/history.jsonl").read_text().splitlines()]


def check_exact(models, output, tuned, steps):
    """History, alignment and vector of a run are those of the whole weights that the run itself gathered at its end."""
    exported, expected = TaskVector.open(output / "lata/task_vector"), TaskVector.between(models / "instruct", tuned)
    assert set(exported) == set(expected)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    instruction = TaskVector.open(models / "instruction")
    assert exported.manifest.alignment.values == pytest.approx(align(expected, instruction).values, rel=1e-9)
    assert exported.manifest.start_identity.content_hash == instruction.manifest.tuned_identity.content_hash
    rows = history(output)
    assert [row["step"] for row in rows] == steps
    norm = sum(expected[name].double().square().sum().item() for name in expected) ** 0.5
    assert rows[-1]["task_norm"] == pytest.approx(norm, rel=1e-9)
