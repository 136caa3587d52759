import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import LataError
from lata_lightning.evaluation.accuracy import ExactMatch, exact_match
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import INSTRUCT


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def pairs():
    return [pair for skill in ("twice", "last", "larger", "reverse", "compute") for pair in exercises(skill, "test", 8, seed=1)]


def generated(model, tokenizer, prompt):
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**encoded, do_sample=False, max_new_tokens=16)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :])


def test_it_equals_exact_match_of_greedy_generation(model, tokenizer, pairs):
    matches = ExactMatch(tokenizer, pairs).matches(model)
    assert matches == [generated(model, tokenizer, prompt) == answer + "<|end|>" for prompt, answer in pairs]
    assert 0 < sum(matches) < len(matches)


def test_the_size_of_the_batches_changes_nothing(model, tokenizer, pairs):
    expected = ExactMatch(tokenizer, pairs).matches(model)
    assert ExactMatch(tokenizer, pairs, tokens_per_batch=1).matches(model) == expected
    assert ExactMatch(tokenizer, pairs, tokens_per_batch=60).matches(model) == expected


def test_the_score_is_the_share_of_matches(model, tokenizer, pairs):
    assert exact_match(model, tokenizer, pairs) == sum(ExactMatch(tokenizer, pairs).matches(model)) / 40


def test_an_answer_that_should_have_ended_earlier_does_not_count(model, tokenizer):
    right, longer = ("copy tobik", "tobik"), ("copy tobik", "tobi")
    assert ExactMatch(tokenizer, [right, longer]).matches(model) == [True, False]


def test_the_model_keeps_its_mode_and_its_weights(model, tokenizer, pairs):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    exact_match(model, tokenizer, pairs[:2])
    assert model.training
    model.eval()
    exact_match(model, tokenizer, pairs[:2])
    assert not model.training
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_no_pairs_are_refused(tokenizer):
    with pytest.raises(LataError, match="answers need at least one pair and one token a batch, not 0 and 4096"):
        ExactMatch(tokenizer, [])
