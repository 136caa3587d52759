"""What has been computed is not computed again, is as JSON gives it back, and is forgotten where it is about something else."""

import json

import pytest

from study.real.record import Record, replace_json


def test_a_value_is_computed_once_even_by_another_record(tmp_path):
    path = tmp_path / "folder" / "record.json"
    assert Record(path, {"seed": 0})("a", lambda: (1, 2.5)) == [1, 2.5]
    later = Record(path, {"seed": 0})
    assert "a" in later
    assert later("a", lambda: pytest.fail("computed again")) == [1, 2.5]


def test_a_value_is_the_same_before_and_after_it_was_written(tmp_path):
    record = Record(tmp_path / "record.json", {})
    assert record("a", lambda: {1: (2,)}) == {"1": [2]} == record("a", dict)


def test_values_about_something_else_are_forgotten(tmp_path):
    path = tmp_path / "record.json"
    Record(path, {"model": "one"})("a", lambda: 1)
    other = Record(path, {"model": "other"})
    assert "a" not in other
    assert other("a", lambda: 2) == 2


def test_a_value_that_is_no_number_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        Record(path, {})("a", lambda: float("nan"))
    assert not path.exists()


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    replace_json(path, {"old": 1})
    with pytest.raises(TypeError):
        replace_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
