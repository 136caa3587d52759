"""Ctrl-C in any command: status 130, one closing line, nothing half-written."""

import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lata_lightning.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = "quickstart-output/models"
DATA = "quickstart-output/data/math.jsonl"
VECTOR = "quickstart-output/runs/math/task_vector"


@pytest.fixture
def lata(short_quickstart, tmp_path, monkeypatch, capsys):
    """Runs a command beside the output of a quickstart; gives exit status and standard error."""
    (tmp_path / "quickstart-output").symlink_to(short_quickstart)
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = main(line.split())
        return status, capsys.readouterr().err

    return run


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (f"merge {MODELS}/instruct {VECTOR} --weighting none --output out", "lata_lightning.merging.merge.combined"),
        (f"extract {MODELS}/instruct {MODELS}/math --output out", "lata_lightning.vectors.artefact.layout_size"),
        (f"regress {MODELS}/instruct {VECTOR} --output out", "lata_lightning.vectors.artefact.ShardWriter.stream"),
        (f"solve {MODELS}/instruct {VECTOR} --data {DATA} --samples 2 --output out", "lata_lightning.linearity.solution.write_json"),
        (f"evaluate {MODELS}/instruct --data {DATA} --output out", "lata_lightning.evaluation.accuracy.ExactMatch.score"),
        (f"tune {MODELS}/instruct {VECTOR} --data {DATA} --figure false --output out", "lata_lightning.evaluation.tuning.tune"),
        ("report quickstart-output/runs/math --output out", "lata_lightning.report.page.render"),
    ],
)  # fmt: skip
def test_ctrl_c_ends_a_command_with_130_and_leaves_nothing(lata, tmp_path, monkeypatch, line, where):
    monkeypatch.setattr(where, interrupt)
    status, said = lata(line)
    assert status == 130
    assert [text for text in said.splitlines() if text][-1] == "lata: interrupted; nothing was left half-written"
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-output"]


@pytest.fixture
def pressing(monkeypatch):
    """Presses Ctrl-C in the optimizer step of a number, counted from 1."""
    before = signal.getsignal(signal.SIGINT)
    # A shell starts a program in the background with Ctrl-C ignored, and the tests may be such a program.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(number):
        steps = iter(range(1, sys.maxsize))

        def step(self, trainer, *_):
            if next(steps) == number:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(pl.Callback, "on_before_optimizer_step", step)
        monkeypatch.setattr(pl.LightningModule, "on_before_optimizer_step", lambda self, optimizer: step(self, None))

    yield press
    signal.signal(signal.SIGINT, before)


def fit(folder, *more):
    return main(["fit", "--config", "track_full", "--config", "debug", "--trainer.fast_dev_run", "false", "--output", "run", *more])


def test_ctrl_c_ends_a_fit_with_130_and_the_run_can_begin_again(tmp_path, monkeypatch, pressing, capsys):
    monkeypatch.chdir(tmp_path)
    pressing(1)
    handler = signal.getsignal(signal.SIGINT)
    assert fit(tmp_path, "--trainer.max_steps", "2") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [line for line in capsys.readouterr().err.splitlines() if line][-1].startswith(
        "lata: interrupted; nothing was left half-written"
    )
    assert not Path("run/lata/task_vector").exists()


def test_ctrl_c_in_a_quickstart_leaves_what_goes_on_with_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lata_lightning.quickstart.job._Job._fine_tune", interrupt)
    assert main(["quickstart", "--output", "out"]) == 130
    assert [text for text in capsys.readouterr().err.splitlines() if text][-1].startswith(
        "lata: interrupted; nothing was left half-written"
    )
    assert (tmp_path / "out/vectors/instruction/task_vector.json").is_file()
    assert not list(tmp_path.rglob("*partial*"))


def test_ctrl_c_in_a_quickstart_that_replaces_another_brings_the_other_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lata-quickstart").touch()
    monkeypatch.setattr("lata_lightning.quickstart.job._Job._fine_tune", interrupt)
    assert main(["quickstart", "--output", "out", "--overwrite"]) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lata-quickstart"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
