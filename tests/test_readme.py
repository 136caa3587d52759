"""The README's code is run as it stands there, in a folder that a quickstart has filled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")

pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_quickstart):
    directory = tmp_path_factory.mktemp("readme")
    (directory / "quickstart-output").symlink_to(short_quickstart)
    return directory


def run(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_first_python_block_prints_an_alignment_table(folder):
    printed = run([sys.executable, "-c", blocks("python")[0]], folder)
    assert "alignment at step 75" in printed
    assert "model.layers.7" in printed
    assert len(blocks("python")[0].strip().splitlines()) <= 15


def test_the_other_python_blocks_run(folder):
    for block in blocks("python")[1:]:
        run([sys.executable, "-c", block], folder)
    AutoModelForCausalLM.from_pretrained(folder / "merged-in-python")


def test_the_commands_run_in_the_order_in_which_they_stand_there(folder):
    for block in blocks("bash"):
        printed = run(["bash", "-euc", block], folder)
    assert "tensors are what was written" in printed
    AutoModelForCausalLM.from_pretrained(folder / "merged")
    AutoModelForCausalLM.from_pretrained(folder / "forgotten")
