"""Whether something predicts what merging loses: correlations of made-up pairs by hand, against scipy, and with an interval that knows the experts."""

from itertools import combinations

import pytest
import torch
from scipy.stats import spearmanr

from lata_lightning.vectors.task_vector import TaskVector
from study.real.prediction import LOST, correlations, cosine, predictors, seen

NAMES = ("a", "b", "c", "d", "e")


def expert(number):
    history = [{"task_norm": 1.0 + number}, {"task_norm": 2.0 + number}]
    return {"alignment": 0.875 - 0.125 * number, "relative norm": 0.1 * number, "spread": 0.05, "growth": 0.5, "history": history}


def result(seed=0, cosines=None):
    experts = {name: expert(number) for number, name in enumerate(NAMES)}
    pairs = {}
    for number, pair in enumerate(combinations(NAMES, 2)):
        value = number / 10 if cosines is None else cosines[number]
        pairs[", ".join(pair)] = {"lost": dict.fromkeys(LOST, value**2), "cosine": value, "interference": 1 - value}
    return {"seed": seed, "kinds": {"full": {"experts": experts, "pairs": pairs}}}


def test_what_rises_with_the_loss_has_correlation_1_and_what_falls_minus_1():
    found = correlations([result()], "full")[LOST[0]]
    assert found["cosine"].value == pytest.approx(1.0)
    assert found["interference"].value == pytest.approx(-1.0)
    assert found["cosine"].low == pytest.approx(1.0)
    assert found["interference"].high == pytest.approx(-1.0)


def test_a_correlation_is_that_of_scipy_averaged_over_the_seeds():
    results = [result(0), result(1, [0.3, 0.1, 0.9, 0.2, 0.8, 0.5, 0.4, 0.7, 0.6, 0.05])]
    expected = []
    for each in results:
        pairs = each["kinds"]["full"]["pairs"]
        alignments = [-float(NAMES.index(pair[0]) + NAMES.index(pair[3])) for pair in pairs]
        expected.append(spearmanr(alignments, [figures["lost"][LOST[1]] for figures in pairs.values()]).statistic)
    found = correlations(results, "full")[LOST[1]]["alignment"]
    assert found.value == pytest.approx(sum(expected) / 2)
    assert found.low < found.value < found.high


def test_what_is_the_same_for_all_pairs_predicts_nothing():
    assert "spread" not in correlations([result()], "full")[LOST[0]]


def test_too_few_pairs_have_no_correlation():
    few = result()
    figures = few["kinds"]["full"]["pairs"]
    few["kinds"]["full"]["pairs"] = {pair: figures[pair] for pair in list(figures)[:3]}
    assert correlations([few], "full") == {}


def test_predictors_of_a_pair_are_means_a_ratio_and_what_lies_between():
    found = predictors({"cosine": 0.2, "interference": 0.4}, [expert(0), expert(2)])
    assert found["alignment"] == pytest.approx(0.75)
    assert found["ratio of norms"] == pytest.approx(2 / 4)
    assert (found["cosine"], found["interference"]) == (0.2, 0.4)


def test_without_an_instruction_vector_alignment_is_no_predictor():
    bare = expert(0) | {"alignment": None}
    assert "alignment" not in predictors({"cosine": 0.0, "interference": 0.0}, [bare, expert(1)])


class _Run:
    history = (
        {"task_norm": 1.0},
        {"task_norm": 3.0},
        {"task_norm": 3.5},
        {"task_norm": 4.0, "alignment": 0.9, "relative_norm": 0.1, "alignment_spread": 0.02},
    )


def test_growth_is_the_share_of_the_norm_half_way():
    found = seen(_Run())
    assert (found["growth"], found["alignment"], found["spread"], found["relative norm"]) == (0.75, 0.9, 0.02, 0.1)


def test_the_cosine_of_two_vectors_is_that_of_torch():
    start, one, other = ({"lm_head.weight": torch.randn(3, 4), "norm.weight": torch.randn(5)} for _ in range(3))
    vectors = [TaskVector.between(start, tuned) for tuned in (one, other)]
    flat = [torch.cat([vector[name].flatten() for name in start]) for vector in vectors]
    assert cosine(*vectors) == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
    assert cosine(vectors[0], TaskVector.between(start, start)) == 0.0
