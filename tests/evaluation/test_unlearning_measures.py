import math

import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.evaluation import unlearning_measures
from lata_lightning.evaluation.unlearning_measures import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    model_utility,
    rouge_l_recall,
    truth_ratio,
)


def test_the_truth_ratio_divides_by_the_right_answer_and_takes_the_geometric_mean_of_the_wrong_ones():
    # Probabilities 1/2 for the right answer, 1/4 and 1/16 for the wrong ones, whose geometric mean is 1/8.
    assert truth_ratio(math.log(2), [math.log(4), math.log(16)]) == pytest.approx(0.25)
    assert truth_ratio(math.log(4), [math.log(2)]) == pytest.approx(2)
    assert truth_ratio(1e4, [0.0]) == math.inf


def test_a_truth_ratio_without_wrong_answers_is_refused():
    with pytest.raises(LataError, match="at least one wrong answer"):
        truth_ratio(1.0, [])


def test_forget_quality_of_two_samples_worked_by_hand():
    pytest.importorskip("scipy")
    # The empirical distributions differ by 1 everywhere between the samples; of the C(6, 3) = 20 orders of six values, two do.
    found = forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    assert found.value == pytest.approx(2 / 20)
    assert found.log10 == pytest.approx(-1)
    assert forget_quality([0.1, 0.2, 0.3], [0.3, 0.1, 0.2]).value == pytest.approx(1)


def test_forget_quality_is_the_kolmogorov_smirnov_test_of_tofu():
    stats = pytest.importorskip("scipy.stats")
    ours, reference = torch.rand(80).tolist(), (torch.rand(60) ** 2).tolist()
    # TOFU tests the inverse ratios, which changes nothing.
    expected = stats.ks_2samp([1 / ratio for ratio in ours], [1 / ratio for ratio in reference]).pvalue
    found = forget_quality(ours, reference)
    assert found.value == pytest.approx(expected)
    assert found.log10 == pytest.approx(math.log10(expected))
    assert 0 < found.value < 0.5


def test_forget_quality_too_small_for_a_float_has_no_logarithm(monkeypatch):
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.setattr(stats, "ks_2samp", lambda *_: type("Result", (), {"pvalue": 0.0}))
    assert forget_quality([0.1], [0.2]) == (0.0, None)


def test_forget_quality_of_nothing_is_refused():
    with pytest.raises(LataError, match="two models, got 0 and 2 of them"):
        forget_quality([], [0.1, 0.2])


@pytest.mark.parametrize(
    ("hits", "memorised", "strength"),
    [
        ([True, True, True, True], 1, 1),
        ([False, True, True, True], 3 / 4, 3 / 4),
        ([True, False, True, True], 3 / 4, 2 / 4),
        ([True, True, True, False], 3 / 4, 0),
        ([False, False, False, False], 0, 0),
    ],
)
def test_exact_memorisation_counts_hits_and_extraction_strength_those_at_the_end(hits, memorised, strength):
    assert exact_memorization(hits) == memorised
    assert extraction_strength(hits) == strength


@pytest.mark.parametrize("measure", [exact_memorization, extraction_strength])
def test_an_answer_without_tokens_is_refused(measure):
    with pytest.raises(LataError, match="an answer without tokens"):
        measure([])


def test_rouge_l_recall_by_hand():
    pytest.importorskip("nltk")
    answers = ["The cat sat on the mat", "cats sitting", "nothing", "", "mat the on"]
    # Longest common subsequences of 6, 1 ("cats" has the stem "cat"), 0, 0 and 2 ("the on") of six words.
    references = ["The cat sat on the mat."] * 5
    assert rouge_l_recall(answers, references) == pytest.approx([1, 1 / 6, 0, 0, 2 / 6])


def test_rouge_l_recall_agrees_with_the_scorer_that_tofu_uses():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    answers = ["Basil's novels explore identities", "He was born in Kuwait City in 1956.", "twice twice two"]
    references = ["The novels of Basil often explore identity", "He was born on 08/09/1956 in Kuwait City", "two twice"]
    expected = [scorer.score(reference, answer)["rougeL"].recall for answer, reference in zip(answers, references, strict=True)]
    assert rouge_l_recall(answers, references) == pytest.approx(expected)
    assert 0 < min(expected) < max(expected)


def test_rouge_l_of_unequal_numbers_is_refused():
    with pytest.raises(LataError, match="got 1 and 2"):
        rouge_l_recall(["a"], ["a", "b"])


def test_model_utility_is_the_harmonic_mean():
    assert model_utility([1, 0.5, 0.25]) == pytest.approx(3 / (1 + 2 + 4))
    assert model_utility([0.9, 0, 0.9]) == 0
    for wrong in ([], [0.5, -0.1]):
        with pytest.raises(LataError, match="at least one value and none below 0"):
            model_utility(wrong)


def test_a_measure_without_its_library_says_which_extra_has_it(monkeypatch):
    monkeypatch.setattr(unlearning_measures, "find_spec", lambda name: None)
    for module, measure in (("scipy", forget_quality), ("nltk", rouge_l_recall)):
        with pytest.raises(LataError, match=rf"needs {module}, which is not installed: pip install 'lata_lightning\[eval\]'"):
            measure(["a"], ["a"])
