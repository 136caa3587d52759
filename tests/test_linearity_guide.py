"""The blocks of the page on linearity are run as they stand there, in a folder that a quickstart has filled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lata_lightning import TaskVector
from lata_lightning.linearity.solution import Solution

PAGE = (Path(__file__).parent.parent / "docs" / "linearity.md").read_text("utf-8")

pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_quickstart):
    directory = tmp_path_factory.mktemp("linearity-guide")
    (directory / "quickstart-output").symlink_to(short_quickstart)
    return directory


def run(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_commands_measure_solve_and_merge(folder):
    printed = [run(["bash", "-euc", block], folder) for block in blocks("bash")]
    assert "model.layers.7.mlp" in printed[0]
    AutoModelForCausalLM.from_pretrained(folder / "merged-in-closed-form")
    record = json.loads((folder / "merged-in-closed-form/merge.json").read_text())
    assert [term["coefficients"] for term in record["terms"]] == [
        dict(solved.coefficients) for solved in Solution.open(folder / "coefficients.json").vectors
    ]


def test_the_python_block_runs(folder):
    (block,) = blocks("python")
    assert "model.layers.0.attention" in run([sys.executable, "-c", block], folder)
    AutoModelForCausalLM.from_pretrained(folder / "merged-from-python")


def test_the_page_names_every_field_of_the_file(folder):
    start, tuned = folder / "quickstart-output/models/instruct", folder / "quickstart-output/models/math"
    layers = TaskVector.between(start, tuned).layers.layers()
    assert len(layers) == 8
    document = Solution.open(folder / "coefficients.json").to_json()
    fields = set(re.findall(r"`(\w+)`", PAGE.split("## The file")[1].split("## Source")[0]))
    assert set(document) <= fields
    assert set(document["vectors"][0]) <= fields
    assert set(document["layers"]["model.layers.0"]) <= fields
