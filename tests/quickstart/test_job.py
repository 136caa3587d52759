import json

import pytest
from short_quickstart import SHORT, small
from transformers import AutoModelForCausalLM

from lata_lightning import TaskVector
from lata_lightning.errors import OutputError
from lata_lightning.quickstart import job
from lata_lightning.quickstart.exercises import split_of
from lata_lightning.quickstart.experts import EXPERTS
from lata_lightning.quickstart.methods import REGRESSION, TREATMENTS, WITHOUT_SAMPLES
from lata_lightning.quickstart.results import Results
from lata_lightning.quickstart.scoring import GROUPS


@pytest.fixture(scope="module")
def finished(short_quickstart, tmp_path_factory):
    """The whole job, twice."""
    directory = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        second = job.run(directory / "two", experts=SHORT)
    (directory / "one").symlink_to(short_quickstart)
    return directory, Results.load(short_quickstart), second


def test_two_runs_give_the_same_tables(finished):
    directory, one, other = finished
    assert one == other
    assert (directory / "one/results.txt").read_text() == (directory / "two/results.txt").read_text()


def test_every_expert_leaves_its_vector_its_history_and_its_model(finished):
    directory, _, _ = finished
    for name in EXPERTS:
        vector = TaskVector.open(directory / "one/runs" / name / "task_vector")
        assert vector.manifest.alignment is not None
        assert len(vector.manifest.coefficients) == len(vector.layers.blocks) >= 8
        rows = [json.loads(line) for line in (directory / "one/runs" / name / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
    for name in (*EXPERTS, "merged", "forgotten"):
        AutoModelForCausalLM.from_pretrained(directory / "one/models" / name)


def test_the_validation_problems_lie_beside_the_models(finished):
    directory, _, _ = finished
    counts = {}
    for group in GROUPS:
        rows = [json.loads(line) for line in (directory / f"one/data/{group}.jsonl").read_text().splitlines()]
        assert all(set(row) == {"prompt", "answer"} and split_of(row["prompt"]) == "validation" for row in rows)
        counts[group] = len(rows)
    assert counts == {"math": 10, "string": 10, "instruct": 21, "unwanted": 10}


def test_the_tables_hold_every_method_and_the_models_themselves(finished):
    _, results, _ = finished
    assert [row.name for row in results.models] == ["instruct", "math expert", "string expert", "unwanted expert"]
    assert [row.name for row in results.merges] == ["instruct, nothing merged", *TREATMENTS, WITHOUT_SAMPLES, REGRESSION]
    assert [row.name for row in results.forgetting] == ["target, nothing forgotten", *TREATMENTS]
    assert all(set(row.curve) == {"0", "0.5", "1"} for row in results.merges[1:])


def test_a_finished_run_is_shown_again_instead_of_repeated(finished, capsys):
    directory, results, _ = finished
    assert job.run(directory / "one") == results
    shown = capsys.readouterr()
    assert "task arithmetic" in shown.out
    assert "results of an earlier run" in shown.err


def test_an_interrupted_run_continues_after_its_last_finished_fine_tune(finished, monkeypatch):
    directory, results, _ = finished
    (directory / "two/results.json").unlink()
    trained = []
    monkeypatch.setattr(job, "fine_tune", lambda name, **_: trained.append(name))
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        assert job.run(directory / "two", experts=SHORT) == results
    assert trained == []


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("kept")
    with pytest.raises(OutputError, match="not the output of a quickstart"):
        job.run(tmp_path / "mine")


def test_results_survive_the_way_to_disk_and_back(finished):
    directory, results, _ = finished
    assert Results.load(directory / "one") == results
    assert Results.load(directory) is None
