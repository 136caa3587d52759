import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lata_lightning import TaskVector

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"attention_only.py", "custom_layers.py", "plain_trainer.py", "plot_history.py"}


def test_a_plain_trainer_leaves_a_vector_and_its_history_can_be_drawn(tmp_path):
    printed = run("plain_trainer.py", "out", cwd=tmp_path)
    assert "model.layers.7" in printed
    assert TaskVector.open(tmp_path / "out/task_vector").manifest.coefficients is not None
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) > 4
    pytest.importorskip("matplotlib")
    run("plot_history.py", "out/history.jsonl", "figure.png", cwd=tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_rule_of_ones_own_names_the_layers(tmp_path):
    printed = run("custom_layers.py", cwd=tmp_path)
    # The stage that moved most is the least aligned, and gets the whole of its vector.
    assert "stage3" in printed.splitlines()[2]
    assert printed.splitlines()[2].endswith("coefficient 1.00")
    assert printed.splitlines()[0].endswith("coefficient 0.33")


def test_attention_only_trains_four_tensors_a_block_and_learns(tmp_path):
    printed = run("attention_only.py", "out", cwd=tmp_path)
    assert "trained: 32 of 75 tensors" in printed
    before, after = map(float, re.search(r"right: (\S+) before, (\S+) after", printed).groups())
    assert before == 0
    assert after > 0.5
    vector = TaskVector.open(tmp_path / "out/task_vector")
    assert all(("self_attn" in name) == (name not in vector.unchanged) for name in vector)
