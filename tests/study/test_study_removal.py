"""Taking one expert off a merge: the smallest scale that leaves little is taken, and merging the others again has nothing of it."""

import json

import pytest
import torch
from toy_chains import little, toy_chain

from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.vectors.task_vector import TaskVector
from study import removal, tasks
from study.page import write
from study.settings import Setting

SETTING = Setting("skills", "instruct", ("compute", "reverse", "sort"))


class Reading:
    """A task that is scored by one weight of the model."""

    def __init__(self, index):
        self.index = index

    def score(self, model, split):
        return model.lm_head.weight[0, self.index].item()


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A chain whose experts each raise one weight from 0 to 1."""
    little(monkeypatch)
    made = toy_chain(tmp_path)
    start = {name: torch.zeros_like(tensor) for name, tensor in made.model(made.instruct()).state_dict().items() if "rotary" not in name}
    monkeypatch.setattr(made, "start", lambda kind: start)
    experts = {}
    for index, name in enumerate(SETTING.experts):
        experts[name] = {key: tensor.clone() for key, tensor in start.items()}
        experts[name]["lm_head.weight"][0, index] = 1.0
        monkeypatch.setitem(tasks.TASKS, name, Reading(index))
    monkeypatch.setitem(tasks.TASKS, tasks.INSTRUCT, Reading(5))
    monkeypatch.setattr(made, "expert", lambda name, kind: experts[name])
    monkeypatch.setattr(removal, "SETTINGS", (SETTING,))
    return made


def test_merging_the_others_again_leaves_nothing_and_subtracting_takes_the_smallest_scale_that_leaves_a_tenth(chain):
    found = removal.run(chain)
    assert json.loads(json.dumps(found)) == found
    entries = found["settings"][SETTING.name]
    assert [entry["taken"] for entry in entries] == list(SETTING.experts)
    start = chain.start("instruct")
    vectors = [TaskVector.between(start, chain.expert(name, "instruct")) for name in SETTING.experts]
    merged = merge_matrices(vectors, check_base=False)["lm_head.weight"][0, :3].tolist()
    for number, entry in enumerate(entries):
        ways = entry["ways"]
        assert ways["nothing taken off"]["left"] == pytest.approx(merged[number])
        assert ways["the others merged again"]["left"] == 0
        assert ways["the others merged again"]["scale"] is None
        # The sum has 1 of every expert, and three quarters of the vector leave a quarter.
        assert ways["the vector subtracted from the sum"] == {"scale": 1.0, "left": 0.0, "kept": 1.0, "instruct": 0.0}
        smallest = next(scale for scale in removal.SCALES if merged[number] - scale <= 0.1)
        assert ways["the vector subtracted"]["scale"] == smallest


def test_where_no_scale_leaves_little_there_is_no_figure_and_the_page_says_how_often(chain, monkeypatch, tmp_path):
    monkeypatch.setattr(removal, "SCALES", (0.25,))
    found = removal.run(chain)
    assert found["settings"][SETTING.name][0]["ways"]["the vector subtracted"] is None
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "removal-seed-0.json").write_text(json.dumps(found))
    text = write(folder)
    assert "| the vector subtracted | 0 of 3 | – | – | – |" in text
    assert "| the others merged again | 3 of 3 | 0.0 |" in text
