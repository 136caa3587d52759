"""Means, intervals and verdicts of the comparison of methods, against numbers worked by hand and against scipy's own tests."""

import math

import pytest
from scipy import stats

from lata_lightning.errors import LataError
from study.statistics import (
    FEWEST_SEEDS,
    Interval,
    compare,
    decide,
    differences,
    holm,
    interval,
    mean_by_seed,
    paired_p_value,
    tells_apart,
)


def random_rows(_):
    return ("random 1", "random 2")


def by_seed(*values):
    return dict(enumerate(values))


def test_an_interval_of_five_values_has_the_tabulated_t_of_four_degrees_of_freedom():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Deviation √2.5, t(0.975, 4) = 2.776 445.
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(2.776445105 * math.sqrt(2.5) / math.sqrt(5), rel=1e-9)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_an_interval_is_that_of_scipy():
    values = [0.61, 0.58, 0.66, 0.63, 0.59, 0.7]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_seed_has_a_mean_and_says_nothing_about_the_others():
    found = interval([0.5])
    assert (found.mean, found.half_width, found.low, found.high) == (0.5, None, -math.inf, math.inf)


def test_equal_values_have_an_interval_of_no_width():
    assert interval([0.25] * 5) == Interval(0.25, 0.0, 5)


def test_an_interval_refuses_no_values_and_values_that_are_not_finite():
    with pytest.raises(LataError, match="run at least one seed"):
        interval([])
    with pytest.raises(LataError, match=r"finite numbers; others are 1: \['nan'\]"):
        interval([0.5, math.nan])


def test_differences_are_paired_by_seed_and_not_by_position():
    assert differences({3: 0.75, 1: 0.25}, {1: 0.0, 3: 0.25}) == [0.25, 0.5]


def test_differences_refuse_seeds_that_only_one_side_has():
    with pytest.raises(LataError, match=r"on one side only are 2: \['1', '2'\]"):
        differences({0: 0.5, 1: 0.5}, {0: 0.5, 2: 0.5})


def test_the_mean_of_the_random_ranks_is_taken_seed_by_seed():
    assert mean_by_seed([{0: 0.0, 1: 1.0, 2: 9.0}, {0: 0.5, 1: 0.0}]) == {0: 0.25, 1: 0.5}
    assert mean_by_seed([]) == {}


@pytest.mark.parametrize(
    ("against_task_arithmetic", "against_random", "verdict"),
    [
        ((0.02, 0.01), (0.02, 0.01), "wins"),
        ((0.02, 0.01), (0.02, 0.03), "not separated"),
        ((0.02, 0.03), (0.02, 0.01), "not separated"),
        ((0.02, 0.02), (0.02, 0.01), "not separated"),
        ((-0.02, 0.01), (-0.02, 0.01), "loses"),
        ((-0.02, 0.01), (0.02, 0.01), "loses"),
        ((-0.02, 0.03), (-0.02, 0.01), "not separated"),
    ],
)
def test_a_method_wins_only_if_both_intervals_lie_above_zero(against_task_arithmetic, against_random, verdict):
    assert decide(Interval(*against_task_arithmetic, 5), Interval(*against_random, 5)) == verdict


def test_four_seeds_give_no_verdict():
    assert decide(Interval(0.2, 0.01, FEWEST_SEEDS - 1), Interval(0.2, 0.01, FEWEST_SEEDS)) is None
    assert decide(Interval(0.2, 0.01, FEWEST_SEEDS), Interval(0.2, 0.01, FEWEST_SEEDS - 1)) is None


def test_the_paired_p_value_is_that_of_scipys_paired_test():
    one, other = [0.61, 0.58, 0.66, 0.63, 0.59], [0.6, 0.57, 0.61, 0.64, 0.55]
    expected = stats.ttest_rel(one, other).pvalue
    assert paired_p_value([a - b for a, b in zip(one, other, strict=True)]) == pytest.approx(expected, rel=1e-9)
    assert paired_p_value([0.1]) is None
    assert paired_p_value([0.1, 0.1, 0.1]) is None


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests_and_never_falls():
    # 4 · 0.01 = 0.04; 3 · 0.03 = 0.09; 2 · 0.04 = 0.08, raised to 0.09; 1 · 0.5.
    found = holm({"c": 0.04, "a": 0.01, "d": 0.5, "b": 0.03})
    assert found == pytest.approx({"c": 0.09, "a": 0.04, "d": 0.5, "b": 0.09})
    assert list(found) == ["c", "a", "d", "b"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_a_comparison_judges_by_task_arithmetic_and_by_the_mean_of_the_random_ranks():
    # By seeds: always 3 points above task arithmetic and, on average, 2 above the random rows.
    plain = by_seed(0.50, 0.52, 0.54, 0.49, 0.51)
    scores = {
        "task arithmetic": plain,
        "random 1": {seed: score + 0.02 for seed, score in plain.items()},
        "random 2": plain,
        "better": {seed: score + 0.03 + 0.001 * (seed % 2) for seed, score in plain.items()},
    }
    found = compare(scores, "task arithmetic", random_rows)
    better = found["better"]
    assert better.verdict == "wins"
    assert better.against_task_arithmetic.mean == pytest.approx(0.0304)
    assert better.against_random.mean == pytest.approx(0.0204)
    assert better.p_value < 1e-5
    # What is judged by has no verdict.
    assert found["task arithmetic"].verdict is None
    assert found["task arithmetic"].against_task_arithmetic is None
    assert found["random 1"].verdict is None
    assert found["random 1"].against_random is None


def test_a_method_that_random_ranks_equal_does_not_win_however_far_it_is_above_task_arithmetic():
    plain = by_seed(0.50, 0.52, 0.54, 0.49, 0.51)
    lifted = {seed: score + 0.1 + 0.01 * (seed % 2) for seed, score in plain.items()}
    scores = {"task arithmetic": plain, "random 1": lifted, "random 2": lifted, "row": lifted}
    assert compare(scores, "task arithmetic", random_rows)["row"].verdict == "not separated"


def test_every_method_is_judged_by_the_random_rows_of_its_own_rule():
    plain = by_seed(0.50, 0.52, 0.54, 0.49, 0.51)
    lifted = {seed: score + 0.1 for seed, score in plain.items()}
    scores = {"task arithmetic": plain, "random linear": plain, "random log": lifted, "linear": lifted, "log": lifted}
    found = compare(scores, "task arithmetic", lambda name: ["random " + name.removeprefix("random ")])
    assert (found["linear"].verdict, found["log"].verdict) == ("wins", "not separated")


def test_without_random_ranks_there_is_no_verdict():
    scores = {"task arithmetic": by_seed(0.5, 0.6), "row": by_seed(0.6, 0.8)}
    found = compare(scores, "task arithmetic", random_rows)["row"]
    assert (found.verdict, found.against_random) == (None, None)
    assert found.against_task_arithmetic.mean == pytest.approx(0.15)
    assert compare({"row": by_seed(0.6)}, "task arithmetic", random_rows)["row"].against_task_arithmetic is None


def test_a_method_that_lacks_a_seed_is_compared_over_those_that_both_sides_have():
    scores = {"task arithmetic": by_seed(0.5, 0.6, 0.9), "random 1": by_seed(0.4, 0.5), "row": {1: 0.7, 2: 1.0, 7: 0.1}}
    row = compare(scores, "task arithmetic", random_rows)["row"]
    assert (row.score.count, row.against_task_arithmetic.count, row.against_random.count) == (3, 2, 1)
    assert row.against_task_arithmetic.mean == pytest.approx(0.1)
    assert row.against_random.mean == pytest.approx(0.2)
    nothing = compare({**scores, "row": {7: 0.1}}, "task arithmetic", random_rows)["row"]
    assert (nothing.against_task_arithmetic, nothing.against_random, nothing.verdict) == (None, None, None)


@pytest.mark.parametrize(("headroom", "counts"), [(0.59, False), (0.60, True), (0.85, True), (0.86, False)])
def test_a_setting_counts_where_task_arithmetic_keeps_60_to_85_percent_of_the_gain(headroom, counts):
    assert tells_apart(headroom) is counts
