"""The run object by itself, called as a callback calls it, without a framework that trains."""

import copy
import json

import pytest
import torch
from lightning_models import tiny_llama
from tiny_models import read_back, same_bits

from lata_lightning import LataError, TaskVector
from lata_lightning.callbacks.arguments import RunArguments
from lata_lightning.callbacks.run import Phase, Run


def started(directory, model, *, state=None, resumes=False, **options):
    """A run before its first batch."""
    run = Run(RunArguments(table=False, **options), model, lambda remark: None)
    run.capture()
    run.directory = directory
    run.settle(lambda: None)
    if state is not None:
        run.load_state_dict(state)
    run.enter(resumes=resumes)
    return run


def train(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.01)


def test_a_run_goes_through_its_phases_in_order(tmp_path):
    model = tiny_llama()
    run = Run(RunArguments(table=False), model, lambda remark: None)
    run.capture()
    phases = [run.phase]
    run.directory = tmp_path / "lata"
    run.settle(lambda: None)
    phases.append(run.phase)
    run.enter(resumes=False)
    phases.append(run.phase)
    run.before_batch(0)
    phases.append(run.phase)
    train(model, 1)
    run.record(run.measure(1))
    run.export(1, 0)
    phases.append(run.phase)
    assert phases == sorted(Phase)
    assert {path.name for path in (tmp_path / "lata").iterdir()} == {"history.jsonl", "task_vector"}


def test_another_fit_goes_on_in_training_from_the_start_that_was(tmp_path):
    model = tiny_llama()
    start = copy.deepcopy(model)
    run = started(tmp_path / "one", model)
    run.before_batch(0)
    train(model, 1)
    run.measure(1)
    run.export(1, 0)
    run.go_on()
    assert run.phase is Phase.TRAINING
    run.directory = tmp_path / "two"
    run.take_up_history(1, 0)
    run.before_batch(0)
    train(model, 2)
    run.measure(2)
    run.export(2, 1)
    vector, before = TaskVector.open(tmp_path / "two/task_vector"), dict(start.named_parameters())
    assert all(torch.equal(vector[name], parameter.detach() - before[name].detach()) for name, parameter in model.named_parameters())


def test_another_fit_of_a_run_that_took_no_step_is_before_its_first_batch_still(tmp_path):
    run = started(tmp_path / "lata", tiny_llama())
    run.measure(0)
    run.export(0, 0)
    run.go_on()
    assert run.phase is Phase.ENTERED


@pytest.mark.parametrize(
    ("states", "resumes", "fresh"),
    [
        ([], False, True),
        ([None], False, True),
        # The tuner saves and loads before a fresh run has settled its start, also where a checkpoint is to be resumed afterwards.
        ([None], True, True),
        (["first"], True, False),
        (["first"], False, False),
        (["first", None], True, False),
    ],
)
def test_a_run_is_resumed_where_a_state_with_a_start_was_loaded(tmp_path, states, resumes, fresh):
    first = started(tmp_path / "first", tiny_llama())
    saved = {"first": first.state_dict(), None: {**first.state_dict(), "fingerprint": None}}
    run = Run(RunArguments(table=False), tiny_llama(), lambda remark: None)
    run.capture()
    run.settle(lambda: None)
    for state in states:
        run.load_state_dict(saved[state])
    run.enter(resumes=resumes)
    assert run.fresh is fresh


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    run = Run(RunArguments(table=False), tiny_llama(), lambda remark: None)
    run.capture()
    run.settle(lambda: None)
    with pytest.raises(LataError, match="without state of the callback"):
        run.enter(resumes=True)


def test_a_step_is_recorded_once_and_lines_after_a_checkpoint_are_cut(tmp_path):
    model = tiny_llama()
    run = started(tmp_path / "lata", model)
    run.before_batch(0)
    for step in (1, 2, 3):
        train(model, step)
        assert run.record(run.measure(step))
    assert not run.record(run.measure(3))
    run.take_up_history(2, 0)
    lines = [json.loads(line) for line in (tmp_path / "lata/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [measured.step for measured in run.monitor.history] == [1, 2]


def test_weights_that_were_restored_from_an_earlier_step_are_exported_without_a_line_out_of_turn(tmp_path):
    model = tiny_llama()
    run = started(tmp_path / "lata", model)
    run.before_batch(0)
    train(model, 1)
    run.record(run.measure(1))
    best = copy.deepcopy(model.state_dict())
    train(model, 2)
    run.record(run.measure(2))
    model.load_state_dict(best)
    run.measure_again(1)
    run.export(1, 0)
    lines = [json.loads(line) for line in (tmp_path / "lata/history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert TaskVector.open(tmp_path / "lata/task_vector").manifest.step == 1
    other = started(tmp_path / "other", tiny_llama())
    other.before_batch(0)
    train(other.tracker.root, 1)
    other.measure(1)
    other.export(1, 0)
    assert same_bits(read_back(tmp_path / "lata/task_vector"), read_back(tmp_path / "other/task_vector"))
