import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.evaluation import unlearning_measures
from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.unlearning import UnlearningEvaluation, reference_ratios
from lata_lightning.evaluation.unlearning_measures import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    model_utility,
    rouge_l_recall,
    truth_ratio,
)
from lata_lightning.quickstart.experts import INSTRUCT


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


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT)


ROWS = [
    {"question": "copy tobik", "answer": "tobik", "paraphrased_answer": "it is tobik", "perturbed_answer": ["lemu", "it is lemu"]},
    {"question": "copy lemu", "answer": "lemur", "perturbed_answer": ["kitob"]},
]


@pytest.fixture
def write(tmp_path):
    def written(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


def losses(model, tokenizer, *pairs):
    return [score.loss for score in Answers(tokenizer, pairs).scores(model)]


def test_an_evaluation_puts_the_measures_of_every_row_together(write, model, tokenizer):
    pytest.importorskip("nltk")
    pytest.importorskip("scipy")
    path = write("forget.jsonl", ROWS)
    evaluation = UnlearningEvaluation(tokenizer, path, {"retain": path, "real_authors": path, "world_facts": path}, max_new_tokens=8)
    found = evaluation(model, reference=[0.5, 2.0])
    right = losses(model, tokenizer, ("copy tobik", "it is tobik"), ("copy lemu", "lemur"))
    wrong = losses(model, tokenizer, ("copy tobik", "lemu"), ("copy tobik", "it is lemu"), ("copy lemu", "kitob"))
    plain = losses(model, tokenizer, ("copy tobik", "tobik"), ("copy lemu", "lemur"))
    ratios = [math.exp(right[0] - (wrong[0] + wrong[1]) / 2), math.exp(right[1] - wrong[2])]
    assert evaluation.truth_ratios(model) == pytest.approx(ratios, rel=1e-4)
    rows = found.evaluation["forget_truth_ratio"]["value_by_index"]
    assert [rows[index]["score"] for index in ("0", "1")] == pytest.approx(ratios, rel=1e-4)
    chances = [math.exp(-loss) for loss in plain]
    shares = [
        chances[0] / (chances[0] + math.exp(-wrong[0]) + math.exp(-wrong[1])),
        chances[1] / (chances[1] + math.exp(-wrong[2])),
    ]
    retained = sum(max(0, 1 - ratio) for ratio in ratios) / 2
    expected = {
        "forget_truth_ratio": sum(min(ratio, 1 / ratio) for ratio in ratios) / 2,
        "forget_Q_A_Prob": sum(chances) / 2,
        # It answers "tobik" and "lemu": the first right, the second another word.
        "forget_Q_A_ROUGE": 0.5,
        # After "lemu" it ends the turn instead of going on with "r".
        "exact_memorization": (1 + 4 / 5) / 2,
        "extraction_strength": (1 + 0) / 2,
        "retain_Q_A_Prob": sum(chances) / 2,
        "retain_Q_A_ROUGE": 0.5,
        "retain_Truth_Ratio": retained,
    }
    for prefix in ("ra", "wf"):
        expected |= {f"{prefix}_Q_A_Prob_normalised": sum(shares) / 2, f"{prefix}_Q_A_ROUGE": 0.5, f"{prefix}_Truth_Ratio": retained}
    nine = [value for name, value in expected.items() if name.startswith(("retain", "ra", "wf"))]
    assert len(nine) == 9
    expected["model_utility"] = 9 / sum(1 / value for value in nine)
    quality = forget_quality(ratios, [0.5, 2.0])
    expected |= {"forget_quality": quality.value, "forget_quality_log10": quality.log10}
    assert found.summary == pytest.approx(expected, rel=1e-4)
    assert found.notes == []
    assert found.evaluation["forget_Q_A_ROUGE"]["value_by_index"]["1"]["generation"] == "lemu"
    json.dumps(found.evaluation, allow_nan=False)


def test_a_model_that_prefers_the_wrong_answer_is_as_far_from_forgetting_as_one_that_prefers_the_right_one(write, model, tokenizer):
    pytest.importorskip("nltk")
    path = write("forget.jsonl", [{"prompt": "copy tobik", "answer": "tobim", "perturbed_answer": "tobik"}])
    evaluation = UnlearningEvaluation(tokenizer, path, {"retain": path}, max_new_tokens=8)
    (ratio,) = evaluation.truth_ratios(model)
    assert ratio > 1
    found = evaluation(model).summary
    assert found["forget_truth_ratio"] == pytest.approx(1 / ratio)
    assert found["retain_Truth_Ratio"] == found["model_utility"] == 0


def test_what_cannot_be_measured_is_null_and_said(write, model, tokenizer):
    pytest.importorskip("nltk")
    full, bare = write("full.jsonl", ROWS[:1]), write("bare.jsonl", [{"prompt": "copy tobik", "answer": "tobik"}])
    found = UnlearningEvaluation(tokenizer, bare, {"retain": bare}, max_new_tokens=4)(model, [0.5])
    assert [name for name, value in found.summary.items() if value is None] == [
        "forget_quality", "forget_quality_log10", "forget_truth_ratio", "retain_Truth_Ratio", "model_utility",
    ]  # fmt: skip
    assert found.notes == [
        "no truth ratio and no forget quality: not every row to be forgotten has a 'perturbed_answer'",
        "no model utility: not every row of retain has a 'perturbed_answer'",
    ]
    found = UnlearningEvaluation(tokenizer, full, {}, max_new_tokens=4)(model)
    assert found.summary["forget_quality"] is found.summary["model_utility"] is None
    assert found.notes == [
        "no forget quality: it compares with a model retrained without these rows; give one as the reference",
        "no model utility: it needs questions that the model should still answer",
    ]
    found = UnlearningEvaluation(tokenizer, full, {"real_authors": bare, "retain": full}, max_new_tokens=4)(model)
    assert found.summary["ra_Q_A_Prob_normalised"] is None
    found = UnlearningEvaluation(tokenizer, full, {"retain": full}, max_new_tokens=8)(model)
    assert found.summary["model_utility"] > 0
    assert found.notes[1] == "model utility is over retain only; TOFU's is over retain, real_authors, world_facts"


def test_a_model_without_likelihoods_is_refused(write, model, tokenizer):
    pytest.importorskip("nltk")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(LataError, match="gives 4 answers a likelihood that is no number"):
        UnlearningEvaluation(tokenizer, write("forget.jsonl", ROWS[:1]), {})(model)


def test_an_unknown_set_and_an_empty_answer_are_refused(write, tokenizer):
    with pytest.raises(LataError, match="sets retain, real_authors, world_facts, not on train"):
        UnlearningEvaluation(tokenizer, "forget.jsonl", {"train": "train.jsonl"})
    pytest.importorskip("nltk")
    with pytest.raises(LataError, match="has nothing in column 'answer'"):
        UnlearningEvaluation(tokenizer, write("forget.jsonl", [{"prompt": "copy a", "answer": ""}]), {})


def test_reference_ratios_come_from_the_results_of_a_retrained_model(tmp_path):
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"10": {"score": 3}, "9": {"score": 0.5}}}}))
    assert reference_ratios(path) == [0.5, 3.0]
    for text in ("{}", "[]", "nonsense", '{"forget_truth_ratio": {"value_by_index": {}}}', '{"forget_truth_ratio": {"agg_value": null}}'):
        path.write_text(text)
        with pytest.raises(CorruptFileError, match="holds no truth ratios"):
            reference_ratios(path)


@pytest.mark.skipif("LATA_DATA" not in os.environ, reason="LATA_DATA names no folder with tofu/")
def test_rows_of_tofu_can_be_measured(write, model, tokenizer):
    pytest.importorskip("nltk")
    pytest.importorskip("scipy")
    folder = Path(os.environ["LATA_DATA"]) / "tofu"
    forget, retain = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()[:40]] for name in ("forget10", "retain90")
    )
    # These files have no wrong answers; those of other authors take their place.
    for rows in (forget, retain):
        for index, row in enumerate(rows):
            row["perturbed_answer"] = [rows[(index + 20) % 40]["answer"]]
    sets = [write("forget.jsonl", forget[:4]), {"retain": write("retain.jsonl", retain[:4])}]
    evaluation = UnlearningEvaluation(tokenizer, *sets, max_new_tokens=16)
    reference = evaluation.truth_ratios(model)
    # The model is its own reference: nothing can be told apart.
    found = evaluation(model, reference).summary
    assert found["forget_quality"] == 1
    assert found["forget_quality_log10"] == 0
    assert all(0 <= value <= 1 for name, value in found.items() if name != "forget_quality_log10")
