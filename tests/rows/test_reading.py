import json

import pytest

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.rows.reading import read_rows


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_the_first_rows_of_a_file_are_read(tmp_path):
    rows = [{"text": str(number)} for number in range(5)]
    path = written(tmp_path / "rows.jsonl", rows)
    assert read_rows(path, 3) == rows[:3]
    assert read_rows(str(path), 9) == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_belongs_to_no_column(tmp_path, name):
    text = {"rows.jsonl": '{"prompt": "a", "answer": "b"}\n', "rows.csv": "prompt,answer\na,b\n"}[name]
    (tmp_path / name).write_text(text, "utf-8-sig")
    assert read_rows(tmp_path / name) == [{"prompt": "a", "answer": "b"}]


def test_a_data_set_is_read_as_a_file_is(tmp_path):
    rows = [{"text": str(number)} for number in range(5)]
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", rows)
    assert read_rows(str(tmp_path / "set"), 3) == rows[:3]


def test_files_that_hold_no_samples_are_refused(tmp_path):
    with pytest.raises(LataError, match="at least one row is needed, not 0"):
        read_rows(tmp_path, 0)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(LataError, match="empty holds no rows"):
        read_rows(tmp_path / "empty", 1)
    (tmp_path / "broken").write_text('{"text": "a"}\n{"text"')
    assert read_rows(tmp_path / "broken", 1) == [{"text": "a"}]
    with pytest.raises(CorruptFileError, match="line 2 of .*broken is no JSON"):
        read_rows(tmp_path / "broken", 2)
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(CorruptFileError, match="line 1 of .*list must be a JSON object, it is a list"):
        read_rows(tmp_path / "list", 1)
    with pytest.raises(SourceError, match="nowhere is neither a file nor a data set"):
        read_rows(str(tmp_path / "nowhere"), 1)
