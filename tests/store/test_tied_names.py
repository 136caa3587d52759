"""Tensors under several names; the expected groups are those of transformers' own models."""

import pytest
from tiny_models import llama, weights
from transformers import T5Config, T5ForConditionalGeneration

from lata_lightning.store.tied_names import ties_by_alias, ties_of
from lata_lightning.vectors.task_vector import TaskVector

HEAD = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize(("tied", "groups"), [(True, (HEAD,)), (False, ())])
def test_tied_parameters_are_one_group(tied, groups):
    assert ties_of(llama(0, tied=tied), set(HEAD)) == groups


def test_a_group_of_which_no_name_is_wanted_is_left_out():
    assert ties_of(llama(0, tied=True), {"model.norm.weight"}) == ()


def test_all_names_of_an_embedding_that_is_used_in_several_places_are_listed():
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    (group,) = ties_of(T5ForConditionalGeneration(config), {"shared.weight"})
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= set(group)


def test_other_names_that_a_source_lists_are_grouped_by_the_name_it_holds():
    assert ties_by_alias({"c": "a", "b": "a", "z": "y"}, {"a"}) == (("a", "b", "c"),)


@pytest.mark.parametrize("where", ["directories", "modules", "state dicts"])
def test_a_saved_vector_records_which_names_are_one_tensor(tmp_path, where):
    models = [llama(seed, tied=True) for seed in range(2)]
    if where == "directories":
        for name, model in zip("ab", models, strict=True):
            model.save_pretrained(tmp_path / name)
        models = [tmp_path / "a", tmp_path / "b"]
    elif where == "state dicts":
        models = [model.state_dict() for model in models]
    assert TaskVector.between(*models).save(tmp_path / "vector").manifest.tied == (HEAD,)


def test_a_vector_of_weights_without_ties_records_none(tmp_path):
    assert TaskVector.between(weights(0), weights(1)).save(tmp_path / "vector").manifest.tied == ()
