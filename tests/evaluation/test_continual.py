import math

import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.evaluation.continual import (
    ContinualLearning,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    summary,
)

NAN = math.nan
# Row: after learning task 1, 2, 3; column: task.
MATRIX = [[0.5, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.7, 0.95]]
REFERENCE = [0.1, 0.15, 0.25]


def test_the_four_figures_are_those_worked_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.6 + 0.7 + 0.95) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.5) + (0.7 - 0.8)) / 2)
    assert forward_transfer(MATRIX, REFERENCE) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.25)) / 2)
    # From the best earlier score, which for the first task is that after the second.
    assert forgetting(MATRIX) == pytest.approx(((0.7 - 0.6) + (0.8 - 0.7)) / 2)


def test_a_sequence_under_way_counts_the_tasks_learned_so_far():
    assert average_accuracy(MATRIX[:2]) == pytest.approx(0.75)
    assert backward_transfer(MATRIX[:2]) == pytest.approx(0.2)
    assert forward_transfer(MATRIX[:2], REFERENCE) == pytest.approx(0.05)
    assert forgetting(MATRIX[:2]) == pytest.approx(-0.2)


def test_the_first_stage_has_an_average_and_nothing_else():
    expected = {"average_accuracy": 0.5, "backward_transfer": None, "forward_transfer": None, "forgetting": None}
    assert summary(MATRIX[:1], REFERENCE) == expected
    assert summary([[0.5]], [0.1]) == expected


def test_before_the_first_stage_nothing_has_a_value():
    assert set(summary(torch.empty(0, 3), REFERENCE).values()) == {None}


def test_forward_transfer_is_none_without_a_reference():
    assert forward_transfer(MATRIX, None) is None
    assert summary(MATRIX)["forward_transfer"] is None


def test_what_was_not_measured_is_not_made_up():
    only_learned = [[0.5, NAN, NAN], [0.7, 0.8, NAN], [0.6, 0.7, 0.95]]
    assert average_accuracy(only_learned) == average_accuracy(MATRIX)
    assert backward_transfer(only_learned) == backward_transfer(MATRIX)
    assert forward_transfer(only_learned, REFERENCE) is None
    assert forgetting(only_learned) == forgetting(MATRIX)
    last_only = [[NAN, NAN, NAN], [NAN, NAN, NAN], [0.6, 0.7, 0.95]]
    assert average_accuracy(last_only) == pytest.approx(0.75)
    assert backward_transfer(last_only) is None
    assert forgetting(last_only) is None
    assert forward_transfer(MATRIX, [0.1, NAN, 0.25]) is None


def test_a_score_that_was_higher_before_its_task_was_learned_counts_as_forgotten():
    assert forgetting([[0.5, 0.9, 0.0], [0.5, 0.8, 0.0], [0.5, 0.6, 0.0]]) == pytest.approx((0 + 0.3) / 2)


@pytest.mark.parametrize("wrong", [[[0.1], [0.2]], [0.1, 0.2], torch.empty(0, 0)])
def test_a_matrix_of_another_shape_is_refused(wrong):
    with pytest.raises(LataError, match="a row per stage and a column per task"):
        average_accuracy(wrong)


def test_a_reference_of_another_length_is_refused():
    with pytest.raises(LataError, match=r"one score for each of 3 tasks, its shape is \(2,\)"):
        forward_transfer(MATRIX, [0.1, 0.2])


def filled(metric, rows):
    for stage, row in rows:
        for task, right in enumerate(row):
            # Ten answers in two batches.
            answers = torch.arange(10) < right
            metric.update(answers[:4], task, stage)
            metric.update(answers[4:], task, stage)
    return metric


def test_the_metric_gives_the_figures_of_its_matrix():
    metric = filled(ContinualLearning(2), [(None, (1, 2)), (0, (9, 4)), (1, (6, 8))])
    assert metric.reference.tolist() == [0.1, 0.2]
    assert metric.accuracies.tolist() == [[0.9, 0.4], [0.6, 0.8]]
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx({"average_accuracy": 0.7, "backward_transfer": -0.3, "forward_transfer": 0.2, "forgetting": 0.3})


def test_the_metric_leaves_out_what_has_no_value():
    metric = filled(ContinualLearning(2), [(0, (9, 4))])
    assert set(metric.compute()) == {"average_accuracy"}
    metric.reset()
    assert metric.accuracies.shape == (0, 2)
    # The figures are then asked for before any update, which torchmetrics warns of.
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {}


def test_states_of_two_processes_add_up_to_the_whole():
    one, other, whole = (ContinualLearning(2) for _ in range(3))
    for part, scores in ((one, torch.tensor([1.0, 0.0])), (other, torch.tensor([1.0, 1.0, 0.5]))):
        for metric in (part, whole):
            metric.update(scores, task=0, stage=0)
    one.sums += other.sums
    one.counts += other.counts
    assert one.accuracies[0, 0] == whole.accuracies[0, 0] == 3.5 / 5
    # What torchmetrics does with the states of several processes.
    assert {one._reductions[name].__name__ for name in ("sums", "counts")} == {"dim_zero_sum"}


@pytest.mark.parametrize(("task", "stage"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_an_unknown_task_or_stage_is_refused(task, stage):
    with pytest.raises(LataError, match=f"count from 0 to 1, got task {task} and stage {stage}"):
        ContinualLearning(2).update(torch.ones(1), task, stage)


def test_no_tasks_and_no_scores_are_refused():
    with pytest.raises(LataError, match="at least one task, not 0"):
        ContinualLearning(0)
    with pytest.raises(LataError, match="no scores were given for task 0 at stage None"):
        ContinualLearning(1).update(torch.empty(0), 0, None)
