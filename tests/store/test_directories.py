import json

import pytest

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.directories import adapter_directory, find_directory, json_rows, local_directory, read_json, read_object


def adapter(directory):
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    return directory


def test_an_adapter_is_named_by_its_directory_its_file_or_the_folder_around_it(tmp_path):
    inner = adapter(tmp_path / "run" / "coder")
    (inner / "adapter_model.safetensors").touch()
    assert adapter_directory(inner) == inner
    assert adapter_directory(inner / "adapter_model.safetensors") == inner
    assert adapter_directory(tmp_path / "run") == inner
    assert adapter_directory(tmp_path / "run" / "coder" / "adapter_config.json") is None


def test_a_directory_that_is_an_adapter_or_a_model_does_not_refer_to_those_in_its_folders(tmp_path):
    outer = adapter(tmp_path / "outer")
    adapter(outer / "inner")
    assert adapter_directory(outer) == outer
    adapter(tmp_path / "model" / "inner")
    (tmp_path / "model" / "model.safetensors").touch()
    assert adapter_directory(tmp_path / "model") is None


def test_several_adapters_in_one_folder_are_refused_by_name(tmp_path):
    for name in ("coder", "writer"):
        adapter(tmp_path / name)
    with pytest.raises(SourceError, match=r"holds several adapters, 2: \['coder', 'writer'\]: give one of them"):
        adapter_directory(tmp_path)


def test_rows_of_json_skip_blank_lines_and_name_the_line_that_is_none():
    assert list(json_rows(['{"a": 1}', "", '{"a": 2}'], "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    with pytest.raises(CorruptFileError, match="line 3 of rows.jsonl is no JSON"):
        list(json_rows(['{"a": 1}', "", "{"], "rows.jsonl"))
    with pytest.raises(CorruptFileError, match="line 1 of rows.jsonl must be a JSON object, it is a list"):
        list(json_rows(["[1]"], "rows.jsonl"))


def test_json_that_is_missing_damaged_or_no_object_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(CorruptFileError, match="is missing"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(CorruptFileError, match="is no JSON"):
        read_json(path)
    path.write_text(json.dumps([1]))
    assert read_json(path) == [1]
    with pytest.raises(CorruptFileError, match="must hold a JSON object, it holds a list"):
        read_object(path)


def test_a_file_is_no_directory_of_a_model(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(SourceError, match="is a file where a model directory is expected"):
        find_directory(tmp_path / "a")
    assert find_directory(tmp_path) == (tmp_path, None)


def test_a_local_directory_is_itself_and_other_locations_have_none(tmp_path):
    assert local_directory(str(tmp_path)) == tmp_path
    assert local_directory(None) is local_directory("the model in memory") is local_directory("no-such/model") is None
