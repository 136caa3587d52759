"""Runs that are killed and started again from the beginning, as a queue does it before there is a checkpoint."""

import json

import pytest
import torch
from conformance import Recorded, check_same, fit, instruct, no_leftovers, steps
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning_models import EXPECTED_WARNINGS, tiny_llama
from test_conformance_resume import Fail, run

from lata_lightning.errors import OutputError

pytestmark = EXPECTED_WARNINGS


@pytest.mark.parametrize("base_weights", ["auto", "memory", "spill"])
def test_a_run_killed_before_its_first_checkpoint_and_started_again_leaves_what_the_whole_one_leaves(tmp_path, models, base_weights):
    lata = {"every_n_train_steps": 2, "base_weights": base_weights}
    for step in (3, 5):
        run(tmp_path / "parts", models, keep={"save_last": True}, fail=Fail("on_train_batch_start", step), resume="last", lata=lata)
    assert steps(tmp_path / "parts/lata") == [2, 4]
    assert json.loads((tmp_path / "parts/lata/run.json").read_text())["start"]
    run(tmp_path / "parts", models, keep={"save_last": True}, resume="last", lata=lata)
    run(tmp_path / "whole", models, lata=lata)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")
    assert no_leftovers(tmp_path / "parts/lata")


def test_a_run_that_left_a_checkpoint_when_it_failed_goes_on_from_it_or_begins_anew(tmp_path, models):
    for resumed in (True, False):
        directory = tmp_path / ("resumed" if resumed else "anew")
        saved = OnExceptionCheckpoint(directory, filename="failed")
        run(directory, models, fail=Fail("on_train_batch_start", 7), after=[saved])
        run(directory, models, resume=directory / "failed.ckpt" if resumed else None)
        assert no_leftovers(directory / "lata")
    assert steps(tmp_path / "resumed/lata") == steps(tmp_path / "anew/lata") == [4, 6, 8, 12, 16, 18]


def test_a_run_from_another_start_is_refused_before_its_first_step(tmp_path, models):
    run(tmp_path, models, fail=Fail("on_train_batch_start", 7))
    before = (tmp_path / "lata/history.jsonl").read_text()
    model = instruct(models)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    for other in (model, tiny_llama(seed=8)):
        module = Recorded(other)
        with pytest.raises(OutputError, match=r"unfinished run that started from other weights; \d+ of \d+ tensors differ.*lm_head.weight"):
            fit(tmp_path, models, module=module, after=[ModelCheckpoint(tmp_path / "kept")], enable_checkpointing=True)
        assert module.losses == []
    assert (tmp_path / "lata/history.jsonl").read_text() == before
