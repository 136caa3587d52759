import pytest
import torch

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.store.sources import Origin, StateDictSource
from lata_lightning.store.tokens import Tokens
from lata_lightning.store.vocabulary import compare, resized_config, vocabulary_axes


def model(rows, **config):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(rows, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4),
        "lm_head.weight": torch.zeros(rows, 4),
    }
    return StateDictSource(tensors, Origin(config={"vocab_size": rows, **config}))


def tokens(*words):
    return Tokens(dict(enumerate(words)))


def test_the_axis_of_the_vocabulary_is_where_embedding_and_head_differ_in_size():
    axes, sizes = vocabulary_axes(model(5), model(7))
    assert (axes, sizes) == ({"model.embed_tokens.weight": 0, "lm_head.weight": 0}, (5, 7))
    assert vocabulary_axes(model(5), model(5)) == ({}, (0, 0))


def test_a_size_that_no_config_calls_the_vocabulary_is_refused():
    with pytest.raises(LayoutMismatchError, match="7 is not the vocab_size in the config"):
        vocabulary_axes(model(5), model(7, vocab_size=9))


def test_rows_are_shared_where_both_sides_have_the_same_token_or_padding():
    found = compare(model(5), model(6), (tokens("a", "b", "c"), tokens("a", "b", "c", "d")))
    assert (found.shared, found.extra, found.own) == ((0, 1, 2, 4), (3,), ())


def test_a_row_of_two_tokens_is_refused():
    with pytest.raises(LayoutMismatchError, match="1 rows differ, first: 1 is 'b' and 'x'"):
        compare(model(3), model(4), (tokens("a", "b"), tokens("a", "x")))


def test_without_a_tokenizer_rows_are_compared_by_their_number():
    found = compare(model(5), model(3), (Tokens(None, "one has no tokenizer files"), tokens("a", "b")))
    assert (found.shared, found.extra, found.own) == ((0, 1, 2), (), (3, 4))
    assert found.unknown == "one has no tokenizer files"


def test_a_resized_config_leaves_the_original_as_it_is():
    config = {"vocab_size": 5, "text_config": {"vocab_size": 5, "hidden_size": 4}}
    assert resized_config(config, [("text_config", "vocab_size")], 9)["text_config"] == {"vocab_size": 9, "hidden_size": 4}
    assert config["text_config"]["vocab_size"] == 5
