import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.unlearning import UnlearningEvaluation, reference_ratios
from lata_lightning.evaluation.unlearning_measures import (
    forget_quality,
)
from lata_lightning.quickstart.experts import INSTRUCT


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
