import pytest

from lata_lightning import LataError
from lata_lightning.evaluation.protocols import UNIT_SCALES, addition, negation, normalised_accuracy


class Counted:
    """A function of a scale that notes how it was called."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, scale):
        self.calls.append(scale)
        return self.function(scale)


def test_normalised_accuracy_divides_by_each_tasks_own_model():
    # 0.4 / 0.8 and 0.9 / 0.6.
    assert normalised_accuracy({"a": 0.4, "b": 0.9}, {"b": 0.6, "a": 0.8}) == pytest.approx((0.5 + 1.5) / 2)
    assert normalised_accuracy({"a": 0.7}, {"a": 0.7}) == 1


@pytest.mark.parametrize(
    ("merged", "single", "message"),
    [
        ({}, {}, "at least one; on one side only are 0"),
        ({"a": 1, "b": 1}, {"a": 1}, r"on one side only are 1: \['b'\]"),
        ({"a": 1}, {"a": 0.0}, r"must be above 0 to divide by; it is not in 1: \['a'\]"),
    ],
)
def test_accuracies_that_cannot_be_normalised_are_refused(merged, single, message):
    with pytest.raises(LataError, match=message):
        normalised_accuracy(merged, single)


def test_addition_picks_on_validation_and_tests_once():
    # The mean of both shares is 1 - (s - 0.4)², highest at 0.4; unnormalised, task b alone would decide.
    validation = Counted(lambda scale: {"a": 0.01 * (1 - 2 * (scale - 0.4) ** 2 + scale), "b": 0.9 * (1 - scale)})
    test = Counted(lambda scale: {"a": scale, "b": 0.5})
    found = addition(validation, test, single_validation={"a": 0.01, "b": 0.9}, single_test={"a": 0.8, "b": 0.5})
    assert validation.calls == list(UNIT_SCALES)
    assert (len(UNIT_SCALES), UNIT_SCALES[0], UNIT_SCALES[8], UNIT_SCALES[-1]) == (21, 0, 0.4, 1)
    assert test.calls == [found.scale] == [0.4]
    assert found.accuracy == {"a": 0.4, "b": 0.5}
    assert found.normalised == pytest.approx((0.5 + 1) / 2)
    assert found.curve[0.0] == pytest.approx((0.68 + 1) / 2)


def test_of_equally_good_scales_addition_takes_the_smallest():
    found = addition(
        lambda scale: {"a": 1.0}, lambda scale: {"a": 1.0}, single_validation={"a": 1}, single_test={"a": 1}, scales=[1, 0.5, 2]
    )
    assert found.scale == 0.5


def test_negation_forgets_as_much_as_the_control_allows():
    # The control starts at 0.8 and may fall to 0.76: 0.8 - 0.1 s does so up to 0.4.
    validation = Counted(lambda scale: (0.9 - scale / 2, 0.8 - 0.1 * scale))
    test = Counted(lambda scale: (0.5, 0.7))
    found = negation(validation, test, scales=[0, 0.2, 0.39, 0.41, 1])
    assert (found.scale, found.target, found.control) == (0.39, 0.5, 0.7)
    assert test.calls == [0.39]
    assert validation.calls == [0, 0.2, 0.39, 0.41, 1]
    assert found.curve[1.0] == (pytest.approx(0.4), pytest.approx(0.7))


def test_negation_may_find_that_nothing_can_be_taken_off_or_that_all_can():
    assert negation(lambda scale: (1 - scale, 1 - 2 * scale), lambda scale: (1, 1)).scale == 0
    assert negation(lambda scale: (1 - scale, 1 - scale), lambda scale: (1, 1), control_share=0).scale == 1
    # A target that rises again is not taken off further; equal targets cost nothing more.
    assert negation(lambda scale: (abs(scale - 0.5), 1), lambda scale: (1, 1)).scale == 0.5
    assert negation(lambda scale: (0.3, 1), lambda scale: (1, 1)).scale == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [0.1, 0.2]}, r"needs the scale 0, at which the start is measured, got \[0.1, 0.2\]"),
        ({"scales": []}, "scales must be finite numbers, at least one"),
        ({"control_share": 1.5}, "control_share must lie between 0 and 1, got 1.5"),
    ],
)
def test_a_negation_without_a_meaning_is_refused(options, message):
    with pytest.raises(LataError, match=message):
        negation(lambda scale: (1, 1), lambda scale: (1, 1), **options)


def test_an_addition_without_scales_is_refused():
    with pytest.raises(LataError, match="scales must be finite numbers, at least one"):
        addition(lambda scale: {}, lambda scale: {}, single_validation={}, single_test={}, scales=[])
