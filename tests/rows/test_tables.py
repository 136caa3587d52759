import json

import pytest
from datasets import Dataset

from lata_lightning.errors import LataError
from lata_lightning.rows.schema import check_columns
from lata_lightning.rows.tables import divided, held_out, open_table

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(5)]


def write(path, rows=ROWS):
    """The rows as JSON lines, CSV or Parquet, by the ending of the path."""
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_file_is_read_by_its_ending(tmp_path, name):
    assert list(open_table(write(tmp_path / name))) == ROWS


def test_several_files_and_patterns_are_one_table(tmp_path):
    one, other = write(tmp_path / "one.jsonl", ROWS[:2]), write(tmp_path / "other.jsonl", ROWS[2:])
    assert list(open_table([one, other])) == list(open_table(str(tmp_path / "*.jsonl"))) == ROWS


def test_a_directory_is_a_data_set_with_splits(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:3])
    write(tmp_path / "test.jsonl", ROWS[3:])
    assert list(open_table(str(tmp_path), "test")) == ROWS[3:]


def test_a_streamed_table_gives_the_same_rows(tmp_path):
    assert list(open_table(write(tmp_path / "rows.csv"), streaming=True)) == ROWS


def test_the_side_of_a_row_depends_on_its_content_and_the_seed_only():
    sides = {row["prompt"]: held_out(row, 0.5, seed=3) for row in ROWS}
    backwards = {row["prompt"]: held_out(dict(reversed(row.items())), 0.5, seed=3) for row in reversed(ROWS)}
    assert sides == backwards
    assert [held_out(row, 0.5, seed) for seed in range(8) for row in ROWS] != [held_out(row, 0.5, 3) for _ in range(8) for row in ROWS]


def test_about_the_share_asked_for_is_held_out_and_adding_rows_moves_none():
    rows = list(range(2000))
    kept, held = divided(rows, rows, 0.1, seed=0)
    # Four standard deviations of a share of 2000 rows are 0.027.
    assert len(held) / len(rows) == pytest.approx(0.1, abs=0.027)
    assert sorted(kept + held) == rows
    assert divided(rows[:500], rows[:500], 0.1, seed=0)[1] == [row for row in held if row < 500]


def test_equal_rows_are_never_on_both_sides():
    kept, held = divided(list("abcdefgh" * 3), list("abcdefgh" * 3), 0.4, seed=1)
    assert not set(kept) & set(held)
    assert len(held) % 3 == 0


def test_a_missing_file_is_refused_with_the_folder_it_was_sought_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "./mine", "data/*.csv"):
        with pytest.raises(LataError, match=f"there is no file .*seen from {tmp_path}"):
            open_table(name)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(LataError, match=r"data files end in \.jsonl, .*other endings have 1"):
        open_table(str(tmp_path / "rows.xlsx"))


def test_files_of_two_kinds_and_several_names_are_refused(tmp_path):
    one, other = write(tmp_path / "one.jsonl"), write(tmp_path / "other.csv")
    for sources in ([one, other], ["org/one", "org/other"], [one, "org/one"], []):
        with pytest.raises(LataError, match="files of one kind or the name of one data set"):
            open_table(sources)


def test_a_data_set_that_is_not_at_hand_offline_is_refused_with_the_reason():
    with pytest.raises(LataError, match=r"cannot read split 'train' of 'org/nothing' \(HF_HUB_OFFLINE is set"):
        open_table("org/nothing")


def test_a_broken_file_and_an_unknown_split_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"\n{"')
    with pytest.raises(LataError, match=r"cannot read split 'train' of '.*rows\.jsonl': "):
        open_table(str(tmp_path / "rows.jsonl"))
    with pytest.raises(LataError, match="cannot read split 'test'.*"):
        open_table(write(tmp_path / "whole.jsonl"), "test")


def test_a_table_without_rows_is_refused(tmp_path):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    for name in ("rows.parquet", "rows.csv"):
        with pytest.raises(LataError, match=f"split 'train' of '.*{name}': .*no data"):
            open_table(str(tmp_path / name))


def test_a_missing_column_is_refused_with_those_there_are():
    with pytest.raises(LataError, match="no column 'answer'; its columns are 'prompt', 'completion'"):
        check_columns(["prompt", "completion"], ["prompt", "answer"])


@pytest.mark.parametrize(("share", "side"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_division_with_an_empty_side_is_refused(share, side):
    with pytest.raises(LataError, match=f"of 5 rows leaves the {side} split empty"):
        divided(ROWS, ROWS, share, seed=0)
