import math
from functools import partial

import numpy as np
import pytest
import torch

from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.errors import WeightingError
from lata_lightning.weighting import (
    check_weighting,
    coefficients,
    drop_with_threshold,
    follows_alignment,
    is_own_name,
    linear_drop_by_rank,
    log_drop_by_rank,
    rule_name,
)


def measured(**values):
    return Alignment("block", "instruct", {layer: LayerStats(value, 1.0, 1.0, 1.0) for layer, value in values.items()}, {})


FOUR = {"a": 0.7, "b": 0.9, "c": -0.2, "d": 0.8}  # ranks 3, 1, 4, 2


def test_linear_coefficients_are_ranks_over_the_number_of_layers():
    assert linear_drop_by_rank(FOUR) == {"a": 0.75, "b": 0.25, "c": 1.0, "d": 0.5}


def test_logarithmic_coefficients_are_logarithms_of_ranks():
    # log 3 / log 4, log 1 / log 4, log 4 / log 4, log 2 / log 4.
    assert log_drop_by_rank(FOUR) == pytest.approx({"a": 0.7924812503605781, "b": 0.0, "c": 1.0, "d": 0.5}, abs=1e-15)


def test_layers_at_the_threshold_are_dropped():
    assert drop_with_threshold({"at": 0.95, "below": math.nextafter(0.95, 0), "above": 1.0}) == {"at": 0.0, "below": 1.0, "above": 0.0}
    assert drop_with_threshold(FOUR, threshold=0.8) == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}
    assert set(drop_with_threshold(FOUR, threshold=-1).values()) == {0.0}
    assert drop_with_threshold({"a": 1.0, "b": 0.999}, threshold=1) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("rule", [linear_drop_by_rank, log_drop_by_rank, drop_with_threshold])
def test_coefficients_come_in_layer_order_from_a_mapping_and_from_a_measurement(rule):
    assert list(rule(FOUR).items()) == list(rule(measured(**FOUR)).items())
    assert list(rule(FOUR)) == list(FOUR)


@pytest.mark.parametrize("rule", [linear_drop_by_rank, log_drop_by_rank])
def test_equal_alignments_are_ranked_in_layer_order(rule):
    # Neither the alphabet nor its reverse.
    found = rule({"m": 0.5, "best": 0.9, "z": 0.5, "a": 0.5})
    assert found["best"] < found["m"] < found["z"] < found["a"]
    assert found == pytest.approx(rule({"m": 0.53, "best": 0.9, "z": 0.52, "a": 0.51}))


@pytest.mark.parametrize("rule", [linear_drop_by_rank, log_drop_by_rank])
def test_a_better_aligned_layer_never_gets_the_larger_coefficient(rule):
    values = {f"layer {index}": math.sin(7.0 * index) for index in range(40)}
    found = rule(values)
    by_coefficient = sorted(values, key=found.__getitem__)
    assert [values[layer] for layer in by_coefficient] == sorted(values.values(), reverse=True)


@pytest.mark.parametrize("rule", [linear_drop_by_rank, log_drop_by_rank])
def test_a_single_layer_is_kept_whole(rule):
    assert rule({"only": 0.99}) == {"only": 1.0}


def test_two_layers_get_a_half_and_one_or_nothing_and_one():
    assert linear_drop_by_rank({"a": 0.1, "b": 0.2}) == {"a": 1.0, "b": 0.5}
    assert log_drop_by_rank({"a": 0.1, "b": 0.2}) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(("name", "rule"), [("linear", linear_drop_by_rank), ("log", log_drop_by_rank), ("threshold", drop_with_threshold)])
def test_a_rule_is_found_by_its_name(name, rule):
    assert coefficients(measured(**FOUR), name) == rule(FOUR)


def test_the_threshold_reaches_the_rule():
    assert coefficients(measured(**FOUR), "threshold", 0.9) == {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}


def test_the_weighting_none_gives_one_to_every_layer_even_where_alignment_is_undefined():
    assert coefficients(measured(a=0.3, b=None), "none") == {"a": 1.0, "b": 1.0}


def test_flat_alignments_are_ranked_all_the_same_and_say_that_they_are_flat():
    flat, steep = measured(a=0.90, b=0.93, c=0.949), measured(a=0.90, b=0.96)
    assert flat.spread == pytest.approx(0.049)
    assert (flat.flat, steep.flat) == (True, False)
    assert linear_drop_by_rank(flat) == {"a": 1.0, "b": 2 / 3, "c": 1 / 3}
    assert measured(a=0.5).flat is False
    assert measured().spread == 0.0


def test_an_undefined_alignment_cannot_be_ranked():
    with pytest.raises(WeightingError, match=r"undefined in 2: \['b', 'd'\] of 4 layers.*coarser level"):
        linear_drop_by_rank(measured(a=0.5, b=None, c=0.2, d=None))


@pytest.mark.parametrize("rule", [linear_drop_by_rank, log_drop_by_rank, drop_with_threshold])
@pytest.mark.parametrize("nothing", [{}, measured()])
def test_no_layers_cannot_be_weighted(rule, nothing):
    with pytest.raises(WeightingError, match=r"there is no layer to weight.*layers=…"):
        rule(nothing)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alignments_that_are_no_numbers_are_refused(value):
    with pytest.raises(WeightingError, match=r"finite numbers; they are not in 1: \['b'\]"):
        log_drop_by_rank({"a": 0.1, "b": value})


@pytest.mark.parametrize("threshold", [1.0001, -1.0001, math.nan, math.inf, 95])
def test_a_threshold_that_is_no_cosine_is_refused(threshold):
    with pytest.raises(WeightingError, match=r"threshold must be a cosine, in \[-1, 1\], got"):
        drop_with_threshold(FOUR, threshold)


def test_an_unknown_rule_is_refused_with_the_choices():
    with pytest.raises(WeightingError, match="unknown weighting 'square'; choose one of linear, log, threshold, none"):
        check_weighting("square")
    with pytest.raises(WeightingError, match="unknown weighting"):
        coefficients(measured(**FOUR), "square")


# --- rules of one's own --------------------------------------------------------------------------------------------------------------------


def halves(alignment, least=0.5):
    return {layer: max(value / 2, least) for layer, value in alignment.values.items()}


class Doubled:
    def __call__(self, alignment):
        return {layer: 2 * value for layer, value in alignment.values.items()}


def test_a_function_gives_the_coefficients_in_the_order_of_the_layers():
    found = coefficients(measured(b=0.5, a=0.25), in_reverse)
    assert found == {"b": 0.25, "a": 0.5}
    assert list(found) == ["b", "a"]
    assert coefficients(measured(a=0.5), Doubled()) == {"a": 1.0}


def in_reverse(alignment):
    return {"a": np.float32(0.5), "b": torch.tensor(0.25)}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("log", "log"),
        (halves, "halves"),
        (partial(halves, least=0.1), "halves"),
        (partial(partial(halves)), "halves"),
        (Doubled(), "Doubled"),
    ],
)
def test_a_rule_is_recorded_by_its_name(rule, name):
    assert rule_name(rule) == name


def test_a_function_without_a_name_of_its_own_is_refused():
    def linear(alignment):
        return halves(alignment)

    for rule, name in ((lambda alignment: {}, "<lambda>"), (linear, "linear")):
        with pytest.raises(WeightingError, match=f"recorded by the name of its function, and '{name}' cannot be one"):
            coefficients(measured(a=0.5), rule)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, 0.5], "'own' must give a coefficient by layer, a mapping, and gave list"),
        ({"a": 1.0}, r"'own' must give one coefficient for each of the 2 layers; on one side only are 1: \['b'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"on one side only are 1: \['c'\]"),
        ({"a": 1.0, "b": float("nan")}, r"'own' must give finite numbers; it does not in 1: \['b'\]"),
        ({"a": None, "b": "0.5"}, r"it does not in 2: \['a', 'b'\]"),
    ],
)
def test_a_custom_rule_must_give_one_finite_number_for_each_layer(given, message):
    def own(alignment):
        return given

    with pytest.raises(WeightingError, match=message):
        coefficients(measured(a=0.5, b=0.6), own)


@pytest.mark.parametrize("name", ["", "7up", "thin air", "a/b", "none", "closed-form", "stored", "<lambda>"])
def test_names_that_say_something_else_are_no_names_of_own_rules(name):
    assert not is_own_name(name)


def test_only_rules_by_alignment_follow_it():
    assert [name for name in ("linear", "log", "threshold", "none", "closed-form", "mine") if not follows_alignment(name)] == [
        "none", "closed-form",
    ]  # fmt: skip
