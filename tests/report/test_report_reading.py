import pytest
from report_inputs import row, write_model, write_run

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.report.contents import build


def test_labels_are_the_last_component_or_the_whole_path_where_those_are_equal(tmp_path):
    paths = [write_run(tmp_path / name, [row(1, {"h.0": 0.5})]) for name in ("a/math", "b/math", "c/string")]
    assert [card.label for card in build(paths).cards] == [str(paths[0]), str(paths[1]), "string"]


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match="is no run, vector or merged model: it holds no task_vector, history.jsonl.*There is nothing at this path"
    ):
        build([tmp_path / "none"])


def test_a_folder_of_runs_is_refused_with_their_names(tmp_path):
    for name in ("math", "string"):
        write_run(tmp_path / "runs" / name, [row(1, {"h.0": 0.5})])
    with pytest.raises(SourceError, match="Name what lies in it, 2: \\['math', 'string'\\]"):
        build([tmp_path / "runs"])


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(SourceError, match="Give the output_dir of a LATACallback"):
        build([tmp_path])


def test_a_run_without_any_measurement_is_refused(tmp_path):
    with pytest.raises(SourceError, match="is empty: nothing has been measured yet"):
        build([write_run(tmp_path / "run", [])])


def test_a_path_given_twice_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [row(1, {"h.0": 0.5})])
    with pytest.raises(LataError, match="given more than once are"):
        build([run, run.parent / "." / "run"])


@pytest.mark.parametrize(
    "line",
    ['{"step": 1}', "[]", '{"step": 1, "epoch": 0, "task_norm": NaN, "level": "block", "start": "instruct", "layers": {}, "outside": {}}'],
)
def test_a_history_that_is_none_is_refused_with_its_line(tmp_path, line):
    run = write_run(tmp_path / "run", [row(1, {"h.0": 0.5})])
    with (run / "history.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CorruptFileError, match=r"line 2 of .*history.jsonl is no measurement"):
        build([run])


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"points": []}', '{"points": [{"scale": 1}]}', '{"points": [{"scale": 1, "scores": {"math": NaN}}]}']
)
def test_a_scale_curve_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(CorruptFileError, match="holds no scale curve"):
        build([tmp_path])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("merge.json", '{"terms": [{"vector": "v"}]}'),
        ("merge.json", "{}"),
        ("scores.json", '{"scores": {"math": 3}}'),
        ("scores.json", "{}"),
        ("scores.json", '{"scores": {}, "sample": {"math": {"intervals": {"exact_match": [1]}}}}'),
    ],
)
def test_a_record_of_a_merged_model_that_is_none_is_refused(tmp_path, file, text):
    model = write_model(tmp_path / "one", {"math": 1.0})
    (model / file).write_text(text)
    with pytest.raises(CorruptFileError, match=file):
        build([model])


def test_a_run_of_lata_fit_is_named_after_its_folder(tmp_path):
    assert build([write_run(tmp_path / "runs" / "math" / "lata", [row(1, {"h.0": 0.9})])]).title == "math"
