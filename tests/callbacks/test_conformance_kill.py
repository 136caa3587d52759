import pytest
from conformance import check_same, history, killed_runs
from tiny_models import read_back, same_bits

from lata_lightning import TaskVector


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return killed_runs(tmp_path_factory)


def killed(runs):
    return sorted(path for path in runs.iterdir() if path.name.startswith("run-"))


def test_a_killed_run_leaves_no_vector_or_a_whole_one(runs):
    whole = read_back(runs / "whole/lata/task_vector")
    assert len(killed(runs)) > 10
    for run in killed(runs):
        vector = run / "killed/task_vector"
        if vector.exists():
            assert same_bits(read_back(vector), whole)
            assert TaskVector.open(vector).manifest.step == 4


def test_the_history_of_a_killed_run_is_that_of_the_whole_one_up_to_some_line(runs):
    whole = history(runs / "whole/lata")
    for run in killed(runs):
        if (run / "killed/history.jsonl").exists():
            lines = history(run / "killed")
            assert lines == whole[: len(lines)]


def test_a_run_killed_in_training_that_is_started_again_ends_as_the_whole_one(runs):
    kinds = set()
    for run in killed(runs):
        if list((run / "killed").glob(".*")):
            continue  # killed during the export
        kind, status = (run / "outcome").read_text().split()
        kinds.add(kind)
        assert status == "0", run
        check_same(run / ("lata" if kind == "resumed" else "again"), runs / "whole/lata")
    assert kinds == {"again", "resumed"}
