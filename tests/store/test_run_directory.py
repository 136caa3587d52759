"""What a fresh run may write into, and what an unfinished one has left there."""

import pytest

from lata_lightning.errors import OutputError
from lata_lightning.store.run_directory import begin_output, check_output, end_output

START = {"a.weight": [1, 2], "b.weight": [3, -4]}
RESULTS = ("task_vector", "hf")


def left_by_a_run(directory, start=START):
    directory.mkdir(parents=True)
    begin_output(directory, start)
    (directory / "history.jsonl").write_text('{"step": 1}\n')


def test_an_empty_directory_and_one_that_does_not_exist_are_taken(tmp_path):
    assert check_output(tmp_path, START, RESULTS) is None
    assert check_output(tmp_path / "new/directory", START, RESULTS) is None
    assert (tmp_path / "new/directory").is_dir()


def test_what_an_unfinished_run_from_the_same_start_has_left_is_removed(tmp_path):
    left_by_a_run(tmp_path / "run")
    (tmp_path / "run/start_weights").mkdir()
    (tmp_path / "run/start_weights/rank-00000-000.safetensors").touch()
    (tmp_path / "run/.hf.partial-new").mkdir()
    assert "begins anew" in check_output(tmp_path / "run", START, RESULTS)
    begin_output(tmp_path / "run", START)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}
    end_output(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**START, "b.weight": [3, 4]}, r"1 of 2 tensors differs: \['b.weight'\]"),
        ({"a.weight": [1, 2]}, r"1 of 2 tensors differs: \['b.weight'\]"),
        ({**START, "c.weight": [0, 0]}, r"1 of 3 tensors differs: \['c.weight'\]"),
    ],
    ids=["another value", "one less", "one more"],
)
def test_a_run_from_other_weights_is_refused_with_what_differs(tmp_path, other, named):
    left_by_a_run(tmp_path / "run")
    with pytest.raises(OutputError, match=f"holds the history.jsonl of an unfinished run.*{named}.*seed_everything"):
        check_output(tmp_path / "run", other, RESULTS)
    assert (tmp_path / "run/history.jsonl").exists()


@pytest.mark.parametrize("content", [None, "", "[]", '{"start": 1}', "{}"])
def test_a_history_of_which_the_start_is_not_known_is_refused(tmp_path, content):
    (tmp_path / "history.jsonl").touch()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match="holds the history.jsonl of another run"):
        check_output(tmp_path, START, RESULTS)


@pytest.mark.parametrize("result", RESULTS)
def test_a_finished_run_is_refused_from_the_same_start_too(tmp_path, result):
    left_by_a_run(tmp_path / "run")
    (tmp_path / "run" / result).mkdir()
    with pytest.raises(OutputError, match=f"holds the {result} of another run"):
        check_output(tmp_path / "run", START, RESULTS)


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written to: .*Give another output_dir"):
        check_output(tmp_path / below, START, RESULTS)
