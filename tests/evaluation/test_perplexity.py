import math

import pytest
import torch
from torchmetrics.text import Perplexity as ReferencePerplexity
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning.errors import LataError
from lata_lightning.evaluation.perplexity import Perplexity, perplexity
from lata_lightning.quickstart.corpus import held_out_text
from lata_lightning.quickstart.make_checkpoints import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=256,
        )
    )


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, tokenizer):
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, "any text at all", context_length=5) == pytest.approx(260)


def test_it_agrees_with_torchmetrics_on_the_same_windows(model, tokenizer):
    text = held_out_text()[:992]
    reference = ReferencePerplexity()
    with torch.no_grad():
        for start in range(0, 992, 32):
            window = torch.tensor([tokenizer(text[start : start + 32])["input_ids"]])
            reference.update(model(input_ids=window).logits[:, :-1], window[:, 1:])
    assert perplexity(model, tokenizer, text, context_length=32) == pytest.approx(reference.compute().item(), rel=1e-5)


def test_the_size_of_the_batches_changes_nothing(model, tokenizer):
    found = [Perplexity(tokenizer, held_out_text()[:900], 32, tokens_per_batch=tokens)(model) for tokens in (1, 100, 4096)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_only_the_start_of_the_text_is_used_if_told_so(model, tokenizer):
    text = held_out_text()
    assert Perplexity(tokenizer, text, 32, max_tokens=64)(model) == Perplexity(tokenizer, text[:64], 32)(model)
    assert Perplexity(tokenizer, text, 32, max_tokens=64).count == 2 * 31


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow(model, tokenizer):
    torch.nn.init.constant_(model.model.norm.weight, 1e6)
    assert perplexity(model, tokenizer, held_out_text()[:64], context_length=32) == math.inf


def test_every_part_of_the_model_keeps_its_mode(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    perplexity(model, tokenizer, "any text", context_length=4)
    assert [part.training for part in model.modules()] == modes


def test_what_does_not_fill_a_window_counts_as_well(model, tokenizer):
    text = "a window and a bit"
    losses = []
    for part in (text[:8], text[8:16], text[16:]):
        ids = torch.tensor([tokenizer(part)["input_ids"]])
        with torch.no_grad():
            losses.append((model(input_ids=ids, labels=ids).loss.double().item(), len(part) - 1))
    expected = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    assert perplexity(model, tokenizer, text, context_length=8) == pytest.approx(expected, rel=1e-5)
    assert Perplexity(tokenizer, text, 8).count == 7 + 7 + 1


def test_texts_in_which_nothing_is_predicted_are_refused(tokenizer):
    with pytest.raises(LataError, match="at least two tokens.*none of 2 texts has them"):
        Perplexity(tokenizer, ["a", "b"])


def test_the_model_keeps_its_mode_when_a_score_fails(model, tokenizer):
    model.train()
    model.lm_head.weight.data = torch.zeros(260, 3)
    with pytest.raises(RuntimeError):
        perplexity(model, tokenizer, "any text")
    assert model.training
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_a_window_of_one_token_is_refused(tokenizer):
    with pytest.raises(LataError, match="at least 2 and tokens_per_batch at least 1, not 1 and 4096"):
        Perplexity(tokenizer, "abc", context_length=1)
