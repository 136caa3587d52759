"""What a merge keeps of the experts' gains, by hand; and the rows that are scored."""

import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.schema import pair
from study.real.scoring import Gains, autocast, first_tokens


def test_what_is_kept_is_0_at_the_start_and_1_at_the_expert():
    gains = Gains({"a": 2.0, "b": 3.0}, {"a": 1.0, "b": 2.5})
    assert gains.kept({"a": 2.0, "b": 2.5}) == {"a": 0.0, "b": 1.0}
    assert gains.score({"a": 1.5, "b": 2.75}) == pytest.approx(0.5)


def test_a_loss_above_the_start_counts_below_zero():
    assert Gains({"a": 2.0}, {"a": 1.0}).score({"a": 3.0}) == -1.0


def test_an_expert_that_has_learned_nothing_is_refused():
    with pytest.raises(LataError, match=r"better on its own data set than its start; these are not: 1: \['b'\]. Train them longer"):
        Gains({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 2.0})


def test_rows_are_scored_until_there_are_enough_tokens():
    rows = [pair("12", "3456")] * 5
    # A token is a byte.
    assert len(first_tokens(rows, make_tokenizer(), 13)) == 3
    assert len(first_tokens(rows, make_tokenizer(), 12)) == 2


def test_models_are_scored_in_the_precision_they_are_trained_in():
    layer = torch.nn.Linear(2, 2)
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        with autocast(precision):
            assert layer(torch.ones(1, 2)).dtype == dtype
