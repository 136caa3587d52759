"""Merging experts that are adapters: every row that each seed runs takes them."""

import json

from toy_chains import little, toy_chain

from study import merging, tasks
from study.rules import EVERY_SEED, methods_for
from study.settings import Setting

SETTING = Setting("skills", "instruct", ("compute", "reverse"), rank=2)


def reference(chain, setting, models):
    """Scores under which every expert has learned something; toys learn nothing."""
    splits = ("validation", "test")
    found = {name: {split: dict.fromkeys((*setting.experts, tasks.INSTRUCT), 0.5) for split in splits} for name in models}
    return found | {"own": {split: dict.fromkeys(setting.experts, 1.0) for split in splits}}


def test_every_row_of_the_screen_merges_adapters(tmp_path, monkeypatch):
    little(monkeypatch)
    monkeypatch.setattr(tasks, "base_perplexity", lambda *_: 4.0)
    monkeypatch.setattr(merging, "_reference", reference)
    rows = methods_for("instruct", 5, EVERY_SEED)
    found = merging.run(toy_chain(tmp_path), SETTING, (0.0, 1.0), rows)
    assert found["methods"].keys() == rows.keys()
    assert found["setting"] == {"track": "skills", "protocol": "instruct", "experts": ["compute", "reverse"], "rank": 2}
    assert found["norm"].keys() == {"compute", "reverse"}
    assert all(length > 0 for length in found["norm"].values())
    assert json.loads(json.dumps(found)) == found
