import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import LataError
from lata_lightning.evaluation.answers import AnswerPerplexity, Answers, generated
from lata_lightning.quickstart.exercises import exercises
from lata_lightning.quickstart.experts import INSTRUCT
from lata_lightning.quickstart.make_checkpoints import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def pairs():
    return [pair for skill in ("twice", "reverse", "compute") for pair in exercises(skill, "test", 4, seed=1)]


def by_hand(model, tokenizer, prompt, answer):
    """Log-likelihoods and hits of an answer, one row at a time and in float64."""
    head = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0].double()
    places = range(len(head) - 1, len(head) + len(tail) - 1)
    logs = [logits[place].log_softmax(-1)[token].item() for place, token in zip(places, tail, strict=True)]
    return logs, [logits[place].argmax().item() == token for place, token in zip(places, tail, strict=True)]


def test_scores_are_the_likelihoods_of_single_rows(model, tokenizer, pairs):
    for tokens in (1, 4096):
        scores = Answers(tokenizer, pairs, tokens_per_batch=tokens).scores(model)
        for (prompt, answer), score in zip(pairs, scores, strict=True):
            logs, hits = by_hand(model, tokenizer, prompt, answer)
            assert score.loss == pytest.approx(-sum(logs) / len(logs), rel=1e-4, abs=1e-6)
            assert list(score.hits) == hits
            assert score.probability == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-3)
    assert len({score.hits for score in scores}) > 3


def test_perplexity_of_answers_weighs_every_token_the_same(model, tokenizer, pairs):
    logs = [log for pair in pairs for log in by_hand(model, tokenizer, *pair)[0]]
    assert AnswerPerplexity(tokenizer, pairs)(model) == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-4)


def test_perplexity_that_overflows_is_infinite(model, tokenizer):
    answers = AnswerPerplexity(tokenizer, [("copy a", "a")])
    head = model.lm_head.weight.data
    kept = head.clone()
    try:
        head.mul_(-1e6)
        assert answers(model) == math.inf
    finally:
        head.copy_(kept)


def test_answers_are_generated_in_the_order_of_the_prompts(model, tokenizer):
    prompts = ["copy tobik", "copy a", "twice ab", "last tobik"]
    alone = [generated(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert generated(model, tokenizer, prompts, max_new_tokens=12) == alone
    assert generated(model, tokenizer, prompts, max_new_tokens=12, rows_per_batch=3) == alone
    assert alone[0] == "tobik"
    assert len(generated(model, tokenizer, ["copy tobik"], max_new_tokens=2)[0]) <= 2


def test_the_model_keeps_its_mode_also_when_it_fails(model, tokenizer, pairs):
    model.train()
    Answers(tokenizer, pairs[:1]).scores(model)
    generated(model, tokenizer, ["copy a"], max_new_tokens=1)
    assert model.training
    with pytest.raises(TypeError):
        generated(model, tokenizer, ["copy a"], max_new_tokens="many")
    assert model.training
    model.eval()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_whoever_leaves_off_between_two_batches_is_not_left_without_gradients(model, tokenizer, pairs):
    batches = Answers(tokenizer, pairs, tokens_per_batch=1).token_scores(model)
    next(batches)
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_a_tokenizer_without_a_chat_template_is_refused_unless_pairs_are_plain():
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(LataError, match="has no chat template, which conversations and pairs are put into"):
        Answers(bare, [("a", "b")])
    assert len(Answers(bare, [("a", "b")], template="plain").scores(AutoModelForCausalLM.from_pretrained(INSTRUCT))[0].hits) == 2


def test_no_pairs_and_no_tokens_are_refused(tokenizer):
    with pytest.raises(LataError, match="one token a batch, not 0 and 4096"):
        AnswerPerplexity(tokenizer, [])
    with pytest.raises(LataError, match="one token a batch, not 1 and 0"):
        Answers(tokenizer, [("a", "b")], tokens_per_batch=0)
