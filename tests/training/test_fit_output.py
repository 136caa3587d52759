import os

import pytest

from lata_lightning import LataError
from lata_lightning.training.fit_output import checkpoint_to_resume, log_folders, newest_checkpoint, remove_failed_start

COMMAND = ("fit", "--config", "my recipe.yaml")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def checkpoints(output, *names):
    """Checkpoints, the first one the oldest; a sharded one is a directory."""
    (output / "checkpoints").mkdir(parents=True)
    for age, name in enumerate(names):
        path = output / "checkpoints" / name
        path.mkdir() if name.startswith("sharded") else path.touch()
        os.utime(path, (1000 + age, 1000 + age))


def test_a_directory_without_a_run_is_taken(output):
    assert checkpoint_to_resume(output, None, [output / "lata/task_vector"], COMMAND) is None
    output.mkdir()
    assert checkpoint_to_resume(output, None, [output / "lata/task_vector"], COMMAND) is None


def test_an_unfinished_run_with_a_checkpoint_is_refused_with_the_command_that_goes_on(output):
    checkpoints(output, "epoch=0.ckpt", "epoch=1.ckpt")
    with pytest.raises(LataError, match=r"checkpoint epoch=1.ckpt. Go on with it: lata fit --config 'my recipe.yaml' --ckpt_path last\."):
        checkpoint_to_resume(output, None, [], COMMAND)


def test_a_finished_run_is_refused(output):
    checkpoints(output, "epoch=0.ckpt")
    (output / "lata/task_vector").mkdir(parents=True)
    with pytest.raises(LataError, match=r"holds a finished run \(.*task_vector\). Choose another directory with --output"):
        checkpoint_to_resume(output, None, [output / "lata/task_vector"], COMMAND)


@pytest.mark.parametrize(
    ("names", "newest"),
    [(["b.ckpt", "a.ckpt"], "a.ckpt"), (["last.ckpt", "sharded.ckpt"], "sharded.ckpt"), (["a.ckpt", "last.ckpt"], "last.ckpt")],
)
def test_last_is_the_checkpoint_that_was_written_last(output, names, newest):
    checkpoints(output, *names)
    assert newest_checkpoint(output).name == newest
    assert checkpoint_to_resume(output, "last", [], COMMAND) == str(output / "checkpoints" / newest)


def test_last_begins_anew_where_there_is_no_checkpoint_yet(output):
    assert checkpoint_to_resume(output, "last", [], COMMAND) is None


@pytest.mark.parametrize("given", ["hpc", "best", "s3://bucket/last.ckpt"])
def test_other_words_and_addresses_are_left_to_lightning(output, given):
    assert checkpoint_to_resume(output, given, [], COMMAND) == given


@pytest.mark.parametrize(("names", "said"), [([], "holds none"), (["a.ckpt"], "newest of this run is .*a.ckpt")])
def test_a_checkpoint_that_does_not_exist_is_refused_with_one_that_does(output, names, said):
    checkpoints(output, *names)
    with pytest.raises(LataError, match=f"gone.ckpt does not exist; .*{said}"):
        checkpoint_to_resume(output, "gone.ckpt", [], COMMAND)


def test_a_failed_start_leaves_nothing_of_its_own(output):
    for folder, files in {"version_0": ["config.yaml", "metrics.csv"], "version_1": ["config.yaml"]}.items():
        (output / "logs" / folder).mkdir(parents=True)
        for name in files:
            (output / "logs" / folder / name).touch()
    before = {output / "logs/version_0"}
    (output / "lata").mkdir()
    remove_failed_start(output, before)
    assert {path.name for path in output.iterdir()} == {"logs"}
    assert log_folders(output) == before


def test_a_first_start_that_failed_leaves_no_directory(output):
    (output / "logs/version_0").mkdir(parents=True)
    (output / "logs/version_0/config.yaml").touch()
    remove_failed_start(output, set())
    assert not output.exists()
