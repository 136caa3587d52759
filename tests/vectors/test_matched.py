"""Vectors that lack what was left out of them, with and without a prefix, beside the model they belong to."""

import pytest
import torch
from tiny_models import plus, weights

from lata_lightning import TaskVector
from lata_lightning.errors import LayoutMismatchError
from lata_lightning.store.sources import Origin, StateDictSource
from lata_lightning.vectors.matched import match_vectors

START = weights()
TUNED = plus(START, weights(1), 0.1)
BODY = {name.removeprefix("model."): tensor for name, tensor in START.items() if name != "lm_head.weight"}
TUNED_BODY = {name.removeprefix("model."): tensor for name, tensor in TUNED.items() if name != "lm_head.weight"}


def test_a_vector_is_zero_where_something_was_left_out_of_it():
    vectors = [TaskVector.between(START, TUNED), TaskVector.between(START, TUNED, leave_out=["^lm_head"])]
    matched = match_vectors(StateDictSource(START), vectors)
    whole, headless = matched.readers
    assert set(whole.names) == set(headless.names) == set(START) == set(matched.covered)
    assert torch.equal(whole.read("lm_head.weight"), TUNED["lm_head.weight"] - START["lm_head.weight"])
    assert torch.equal(headless.read("lm_head.weight"), torch.zeros(6, 4))
    assert torch.equal(headless.read_slice("lm_head.weight", (slice(1, 3),)), torch.zeros(2, 4))
    assert (whole.holds("lm_head.weight"), headless.holds("lm_head.weight")) == (True, False)
    assert [names & {"lm_head.weight"} for names in matched.unchanged] == [set(), {"lm_head.weight"}]


def test_layers_have_the_names_of_the_first_vector_whatever_prefix_the_others_have():
    bare, named = TaskVector.between(BODY, TUNED_BODY), TaskVector.between(START, TUNED, leave_out=["^lm_head"])
    for vectors, block in (((named, bare), "model.layers.0"), ((bare, named), "layers.0")):
        matched = match_vectors(StateDictSource(START, Origin(config={"model_type": "made-up"})), vectors)
        assert set(matched.onto.names) == set(START)
        layers = matched.layers
        assert layers.blocks == vectors[0].layers.blocks
        assert {name: layers.positions[name].block for name in START if "layers.0" in name} == {
            name: block for name in START if "layers.0" in name
        }
        assert layers.positions["model.embed_tokens.weight"].part == "embedding"
        assert layers.positions["lm_head.weight"].block is None


def test_patterns_of_what_all_vectors_lack_are_kept_and_others_name_what_remains():
    one = TaskVector.between(START, TUNED, leave_out=["head", "embed|norm"])
    other = TaskVector.between(START, TUNED, leave_out=["head"])
    matched = match_vectors(StateDictSource(START), [one, other])
    assert matched.covered == tuple(name for name in START if "head" not in name)
    # Of what the second pattern matches, the other vector holds everything.
    assert matched.leave_out() == ("head",)
    both = [TaskVector.between(START, TUNED, leave_out=["head", "embed"]), TaskVector.between(START, TUNED, leave_out=["embed|head|mlp"])]
    patterns = match_vectors(StateDictSource(START), both).leave_out()
    assert patterns == ("head", "embed", r"^model\.embed_tokens\.weight$", r"^lm_head\.weight$")


def test_what_a_vector_lacks_without_having_left_it_out_is_refused():
    partial = TaskVector.between({name: BODY[name] for name in list(BODY)[:3]}, {name: TUNED_BODY[name] for name in list(BODY)[:3]})
    with pytest.raises(LayoutMismatchError, match=r"must hold the same tensors; on one side only are"):
        match_vectors(StateDictSource(BODY), [partial])


def test_tensors_of_other_shapes_are_refused_unless_rows_are_to_be_fitted():
    wider = TaskVector.between(weights(vocabulary=8), weights(1, vocabulary=8))
    with pytest.raises(LayoutMismatchError, match="must have the same vocabulary"):
        match_vectors(StateDictSource(START), [wider])
    matched = match_vectors(StateDictSource(START), [wider], same_shapes=False)
    assert matched.readers[0].shape("lm_head.weight") == (8, 4)
