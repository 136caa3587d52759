import os

import pytest

from lata_lightning.errors import OutputError
from lata_lightning.store.output_policy import DryRun, OutputPolicy, end_dry_run, output_policy
from lata_lightning.store.writer import atomic_directory, check_free, check_free_directory, replace_directory, replace_json


@pytest.fixture
def earlier(tmp_path):
    """A directory that looks like a merged model, with content of its own."""
    path = tmp_path / "merged"
    path.mkdir()
    (path / "merge.json").write_text("{}")
    (path / "old.txt").write_text("old")
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_without_a_policy_nothing_is_replaced(earlier):
    with pytest.raises(OutputError, match="exists already and is not empty"), atomic_directory(earlier):
        pass
    assert names(earlier) == ["merge.json", "old.txt"]


def test_a_finished_directory_takes_the_place_of_the_earlier_one(earlier):
    with output_policy(OutputPolicy(overwrite=True)), atomic_directory(earlier) as directory:
        (directory / "new.txt").write_text("new")
        assert names(earlier) == ["merge.json", "old.txt"]
    assert names(earlier) == ["new.txt"]
    assert names(earlier.parent) == ["merged"]


@pytest.mark.parametrize("error", [OutputError("no"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_the_earlier_directory(earlier, error):
    with pytest.raises(type(error)), output_policy(OutputPolicy(overwrite=True)), atomic_directory(earlier):
        raise error
    assert (names(earlier), names(earlier.parent)) == (["merge.json", "old.txt"], ["merged"])


def test_an_earlier_directory_comes_back_if_the_new_one_cannot_get_its_name(earlier):
    with pytest.raises(FileNotFoundError):
        replace_directory(earlier.parent / "absent", earlier)
    assert (names(earlier), names(earlier.parent)) == (["merge.json", "old.txt"], ["merged"])


def test_what_no_command_has_written_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with output_policy(OutputPolicy(overwrite=True)), pytest.raises(OutputError, match="is nothing of that kind: it holds none of"):
        check_free_directory(tmp_path / "home")


def test_an_input_and_what_holds_one_are_never_replaced(earlier):
    (earlier / "part").mkdir()
    for given in (earlier, earlier / "part"):
        policy = OutputPolicy(overwrite=True, inputs=(given,))
        with output_policy(policy), pytest.raises(OutputError, match="cannot be overwritten, as .* is read from it"):
            check_free_directory(earlier)
    with output_policy(OutputPolicy(overwrite=True, inputs=(earlier / "old.txt",))), pytest.raises(OutputError, match="is read from it"):
        check_free(earlier / "old.txt")


def test_a_file_may_be_replaced_but_no_link_and_no_directory(earlier):
    (earlier / "link").symlink_to("old.txt")
    with output_policy(OutputPolicy(overwrite=True)):
        check_free(earlier / "old.txt")
        for path in (earlier / "link", earlier):
            with pytest.raises(OutputError, match="exists already"):
                check_free(path)
        with pytest.raises(OutputError, match="exists already"):
            check_free_directory(earlier / "old.txt")


def test_a_dry_run_ends_where_writing_would_begin_and_leaves_nothing(tmp_path):
    with output_policy(OutputPolicy(dry_run=True)), pytest.raises(DryRun) as stopped, atomic_directory(tmp_path / "a/b", 12):
        pytest.fail("nothing is written in a dry run")
    assert (stopped.value.path, stopped.value.size) == (tmp_path / "a/b", 12)
    assert names(tmp_path) == []
    end_dry_run(tmp_path)


def test_a_dry_run_refuses_what_the_run_would(earlier, tmp_path):
    with output_policy(OutputPolicy(dry_run=True)):
        with pytest.raises(OutputError, match="not empty"), atomic_directory(earlier):
            pass
        with pytest.raises(OutputError, match=r"needs 1,000,\S+ bytes and the disk has"), atomic_directory(tmp_path / "x/y", 10**18):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), atomic_directory(tmp_path / "a"):
        pass


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/scores.json"
    replace_json(path, {"one": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        replace_json(path, {"one": float("nan")})
    assert path.read_text() == '{\n  "one": 1\n}\n'
    assert names(path.parent) == ["scores.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        replace_json(path / "below.json", {})
