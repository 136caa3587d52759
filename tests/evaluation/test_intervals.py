import math

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.evaluation.intervals import perplexity_score, share
from lata_lightning.evaluation.perplexity import Perplexity
from lata_lightning.quickstart.experts import BASE


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (0, 7), (3, 10), (10, 10), (199, 200)])
def test_the_interval_of_a_share_is_that_of_scipy(hits, count):
    score = share([True] * hits + [False] * (count - hits))
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert (score.value, score.n) == (hits / count, count)
    assert score.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert score.interval[0] <= score.value <= score.interval[1]


def test_the_perplexity_of_texts_weighs_every_token_the_same():
    score = perplexity_score([2.0, 12.0], [2, 4])
    assert score.value == pytest.approx(math.exp(14 / 6))
    # Residuals 2 − 14/3 and 12 − 28/3, worked by hand.
    error = math.sqrt((64 / 9 + 64 / 9) * 2) / 6
    assert score.interval == pytest.approx((math.exp(14 / 6 - 1.959964 * error), math.exp(14 / 6 + 1.959964 * error)), rel=1e-6)


def test_equal_texts_leave_no_doubt_and_a_single_one_has_no_interval():
    assert perplexity_score([3.0, 3.0], [3, 3]).interval == pytest.approx((math.e, math.e))
    assert perplexity_score([3.0], [3]).interval is None


def test_a_perplexity_that_overflows_is_infinite():
    assert perplexity_score([1e4, 1e4], [1, 1]).value == math.inf


def test_the_windows_of_a_text_count_as_one_row():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    texts = ["def answer(): return 42\n" * 5, "import os\n", "x = 1"]
    measure = Perplexity(tokenizer, texts, context_length=16)
    score = measure.score(model)
    assert score.n == 3
    assert score.value == pytest.approx(measure(model))
    with torch.inference_mode():
        assert score.interval[0] < score.value < score.interval[1]
