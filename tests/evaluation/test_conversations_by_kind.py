"""What is scored of conversations and texts under the conventions of known tokenizers; expected losses come from transformers' own."""

import math

import pytest
import torch
from tokenizers_of_kinds import bare, chatml, gemma
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning.evaluation.accuracy import exact_match
from lata_lightning.evaluation.answers import AnswerPerplexity, answer_row, generated
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.rows.schema import Sample, pair

TURNS = [{"role": role, "content": content} for role, content in (("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok"))]
ENDS = {gemma: "<end_of_turn>", chatml: "<|im_end|>", bare: "</s>"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=270, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()


def scored(tokenizer, row):
    return tokenizer.decode(row.labels[row.labels != -100])


@pytest.mark.parametrize("kind", list(ENDS))
def test_an_answer_is_scored_up_to_the_token_that_ends_the_turn(kind):
    tokenizer = kind()
    row = answer_row(tokenizer, pair("2+2", "4"), "row 1")
    assert scored(tokenizer, row) == ("4\n</s>" if kind is bare else f"4{ENDS[kind]}")
    assert tokenizer.decode(row.input_ids).endswith(scored(tokenizer, row))
    question = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert answer_row(tokenizer, pair("hi", "x"), "row 1").input_ids.tolist()[: len(question)] == question


@pytest.mark.parametrize("kind", [gemma, chatml])
def test_every_turn_of_the_assistant_is_scored(kind):
    row = answer_row(kind(), Sample("conversation", tuple(TURNS)), "row 1")
    assert scored(kind(), row) == f"yo{ENDS[kind]}ok{ENDS[kind]}"


def test_special_tokens_inside_an_answer_do_not_end_it():
    tokenizer = chatml()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    row = answer_row(tokenizer, pair("q", "<think>hm</think>4"), "row 1")
    assert scored(tokenizer, row) == "<think>hm</think>4<|im_end|>"
    plain = bare()
    plain.add_tokens(["</think>"], special_tokens=True)
    assert scored(plain, answer_row(plain, pair("q", "hm</think>4"), "row 1")) == "hm</think>4\n</s>"


@pytest.mark.parametrize("kind", list(ENDS))
def test_perplexity_of_texts_is_what_transformers_gives_for_their_own_tokens(model, kind):
    tokenizer = kind()
    texts = ["a first text of some length", "short", "one more, of another length"]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append((model(input_ids=ids, labels=ids).loss.double().item(), ids.shape[1] - 1))
    expected = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    for tokens in (1, 40, 4096):
        assert Perplexity(tokenizer, texts, 64, tokens)(model) == pytest.approx(expected, rel=1e-5)


def test_every_window_of_a_long_text_is_predicted_from_bos(model):
    tokenizer = gemma()
    content = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    losses = []
    for window in (content[:3], content[3:6], content[6:]):
        ids = torch.tensor([[tokenizer.bos_token_id, *window]])
        with torch.no_grad():
            losses.append((model(input_ids=ids, labels=ids).loss.double().item(), len(window)))
    expected = math.exp(sum(loss * count for loss, count in losses) / 8)
    measured = Perplexity(tokenizer, "abcdefgh", context_length=4)
    assert measured(model) == pytest.approx(expected, rel=1e-5)
    assert measured.count == 8


@pytest.mark.parametrize("kind", list(ENDS))
def test_a_plain_pair_is_scored_without_a_template(model, kind):
    tokenizer = kind()
    ids = torch.tensor([[*tokenizer("2+2=4")["input_ids"], tokenizer.eos_token_id]])
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
    assert AnswerPerplexity(tokenizer, [("2+2=", "4")], template="plain")(model) == pytest.approx(math.exp(loss), rel=1e-5)


def test_exact_match_and_generation_end_where_the_template_ends_a_turn(model):
    tokenizer = gemma()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    # Every token is as likely as any other, and the first is taken.
    answer = tokenizer.decode([0])
    assert exact_match(model, tokenizer, [("q", answer)]) == 0
    assert len(generated(model, tokenizer, ["q"], max_new_tokens=5)[0]) == 5
