"""The scripts of the user guide are run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lata_lightning import TaskVector

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text("utf-8")
SCRIPTS = {
    block.splitlines()[0].removeprefix("# "): block for block in re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
}
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def run(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all scripts and the instruction vector."""
    directory = tmp_path_factory.mktemp("guide")
    for name, script in SCRIPTS.items():
        (directory / name).write_text(script)
    run(COMMANDS[0], directory)
    return directory


def test_there_are_five_situations():
    assert list(SCRIPTS) == ["plain.py", "resume.py", "ddp.py", "fsdp.py", "cli.py"]


@pytest.mark.parametrize(("script", "output"), [("plain.py", "plain"), ("resume.py", "resumed"), ("ddp.py", "ddp"), ("fsdp.py", "fsdp")])
def test_a_script_leaves_its_history_and_a_weighted_vector(folder, script, output):
    printed = run(f"python {script}", folder)
    assert TaskVector.open(folder / output / "task_vector").manifest.coefficients is not None
    steps = [json.loads(line)["step"] for line in (folder / output / "history.jsonl").read_text().splitlines()]
    assert steps == {"plain": [5, 10], "resumed": [5, 10], "ddp": [4], "fsdp": [4]}[output]
    assert printed


def test_the_command_line_has_a_section_for_the_callback(folder):
    run(COMMANDS[1], folder)
    assert TaskVector.open(folder / "cli/task_vector").manifest.level == "submodule"
