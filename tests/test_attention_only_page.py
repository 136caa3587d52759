"""The scripts of the page on attention-only fine-tuning are run as they stand there, and its table is the one of the benchmark."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lata_lightning import TaskVector

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "attention_only.md").read_text("utf-8")
SCRIPTS = {
    block.splitlines()[0].removeprefix("# "): block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("attention-only")
    for name, script in SCRIPTS.items():
        (directory / name).write_text(script)
    return directory


def run(script, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_has_four_scripts():
    assert list(SCRIPTS) == ["train.py", "projections.py", "head.py", "disentangle.py"]


def test_two_vectors_are_trained_and_compared(folder):
    pytest.importorskip("matplotlib")
    run("train.py", folder)
    moved = [name for name, tensor in TaskVector.open(folder / "reverse/task_vector").items() if tensor.any()]
    assert len(moved) == 8 * 4
    assert all("self_attn" in name for name in moved)
    printed = run("disentangle.py", folder)
    assert "'attention': " in printed
    assert "'mlp'" not in printed
    assert (folder / "disentanglement.png").read_bytes().startswith(b"\x89PNG")


def test_the_projections_are_listed(folder):
    assert run("projections.py", folder).count("layers.0.self_attn") == 4


def test_a_trained_head_is_no_part_of_the_vector(folder):
    assert run("head.py", folder).splitlines()[-1] == "False"


def test_the_table_is_that_of_the_benchmark():
    made = (ROOT / "benchmarks" / "results" / "regimes.md").read_text("utf-8").split("\n\n", 1)[1]
    assert made.strip() in PAGE
