import math

import pytest

from lata_lightning.evaluation.search import COARSE, MOST_POINTS, coarse_to_fine


def searched(curve, start=None, **options):
    asked = []

    def height_at(scale):
        asked.append(scale)
        return curve(scale)

    heights = coarse_to_fine(height_at, curve(0.0) if start is None else start, **options)
    assert list(heights) == [0.0, *asked]
    return heights, asked


@pytest.mark.parametrize("best", [0.03, 0.2, 0.45, 0.7, 1.1, 1.9])
def test_a_curve_with_one_top_is_searched_to_a_fraction_of_the_best_scale(best):
    heights, asked = searched(lambda scale: -abs(scale - best))
    found = max(heights, key=heights.get)
    assert abs(found - best) <= max(0.03, 0.15 * best)
    assert len(asked) <= MOST_POINTS == 11


def test_scales_beyond_the_turn_are_not_scored():
    _, asked = searched(lambda scale: -abs(scale - 0.3))
    assert [scale for scale in asked if scale in COARSE] == [0.1, 0.3, 0.5, 0.7]


def test_one_worse_scale_is_no_turn():
    heights = {0.0: 0.0, 0.1: 0.2, 0.3: 0.1, 0.5: 0.3, 0.7: 0.2, 1.0: 0.1}
    _, asked = searched(lambda scale: heights.get(scale, 0.0))
    assert [scale for scale in asked if scale in COARSE] == [0.1, 0.3, 0.5, 0.7, 1.0]


def test_a_flat_curve_is_not_refined():
    assert searched(lambda scale: 0.0)[1] == list(COARSE)


def test_a_curve_that_only_falls_is_refined_near_the_start():
    _, asked = searched(lambda scale: -scale)
    assert asked == [0.1, 0.3, 0.05, 0.025]


def test_scales_that_are_not_allowed_count_as_worse():
    _, asked = searched(lambda scale: scale if scale <= 0.5 else -math.inf)
    assert [scale for scale in asked if scale in COARSE] == [0.1, 0.3, 0.5, 0.7, 1.0]
    assert max(asked, key=lambda scale: scale if scale <= 0.5 else 0) == 0.5


def test_the_same_scores_give_the_same_search():
    assert searched(lambda scale: math.sin(3 * scale)) == searched(lambda scale: math.sin(3 * scale))


@pytest.mark.parametrize("best", [0.03, 0.45, 0.95, 1.1, 1.9])
def test_a_search_that_begins_at_one_goes_up_and_then_down_and_finds_the_same_best_scale(best):
    heights, asked = searched(lambda scale: -abs(scale - best), first=1.0)
    assert asked[0] == 1.0
    assert abs(max(heights, key=heights.get) - best) <= max(0.05, 0.15 * best)
    assert len(asked) <= MOST_POINTS


def test_a_search_that_begins_at_the_best_scale_scores_two_scales_on_each_side():
    _, asked = searched(lambda scale: -abs(scale - 1.0), first=1.0)
    assert [scale for scale in asked if scale in COARSE] == [1.0, 1.4, 2.0, 0.7, 0.5]
