"""Merging models of different vocabularies; expected values by numpy indexing on the saved files."""

import json

import numpy as np
import pytest
import torch
from in_factors import InFactors
from safetensors.torch import load_file, save_file
from tiny_models import llama, read_back, same_bits, weights, write_checkpoint, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from lata_lightning.errors import LataError, LayoutMismatchError
from lata_lightning.merging.merge import Term, forget, merge
from lata_lightning.merging.rows import AssembledRows
from lata_lightning.merging.vocabularies import between_vocabularies, resized
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import StateDictSource
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

WORDS = 24
UNKNOWN = {"unk_token": "[UNK]"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(added=(), words=WORDS):
    """A tokenizer of whole words, and tokens that were added to it."""
    vocabulary = {f"w{index}": index for index in range(words - 1)} | {"[UNK]": words - 1}
    inner = Tokenizer(models.WordLevel(vocabulary, **UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **UNKNOWN)
    found.add_tokens(list(added))
    return found


def save(directory, seed=0, added=(), *, rows=None, tied=False, dtype=torch.float32, tokens=True, words=WORDS):
    """A Llama with a tokenizer; as many rows as tokens unless given otherwise."""
    model = llama(seed, tied=tied)
    model.resize_token_embeddings(words + len(added) if rows is None else rows, mean_resizing=False)
    # Values on a grid of 2^-10: no difference is ever rounded.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.round(torch.randn_like(parameter) * 64) / 1024)
    model.to(dtype).save_pretrained(directory)
    if tokens:
        tokenizer(added, words).save_pretrained(directory)
    return directory


def arrays(directory):
    return {name: tensor.double().numpy() for name, tensor in read_back(directory).items()}


def term(onto, tuned, scale=1.0, **options):
    vector, _ = between_vocabularies(onto, tuned, "start", **options)
    return Term(vector, scale, tuned)


def equal(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def summed(onto, tuned, scale, rows, extra=()):
    """onto + scale · (tuned − onto) on shared rows, and the rows that tuned adds; other rows of onto as they are."""
    one, other = arrays(onto), arrays(tuned)
    found = {}
    for name, weight in one.items():
        if name not in (EMBEDDING, HEAD):
            found[name] = weight + scale * (other[name] - weight)
            continue
        size = max([len(weight) - 1, *extra]) + 1
        merged = np.zeros((size, weight.shape[1]))
        merged[: len(weight)] = weight
        merged[rows] = weight[rows] + scale * (other[name][rows] - weight[rows])
        merged[list(extra)] = other[name][list(extra)]
        found[name] = merged
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_union_takes_new_tokens_with_their_rows_from_the_tuned_model_whatever_the_scale(tmp_path, tied):
    onto, tuned = save(tmp_path / "onto", 0, tied=tied), save(tmp_path / "tuned", 1, ["<call>", "<end>"], tied=tied)
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union", note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), [24, 25]))
    assert said == [f"only {tuned} has 2 rows from 24 on ('<call>', '<end>'): they are taken from it"]
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 26
    assert tokens("w3 <end>")["input_ids"] == [3, 25]
    assert model(**tokens("w3 <call>", return_tensors="pt")).logits.shape[-1] == 26
    assert (model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_onto_keeps_exactly_its_own_tokens(tmp_path, tied):
    onto, tuned = save(tmp_path / "onto", 0, tied=tied), save(tmp_path / "tuned", 1, ["<call>"], tied=tied)
    said = []
    merge(onto, [term(onto, tuned, 0.25)], tmp_path / "out", vocabulary="onto", note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.25, range(24)))
    assert said == [f"only {tuned} has row 24 ('<call>'): they are dropped"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 24
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 24
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (onto / name).read_bytes()


def test_coefficients_weigh_shared_rows_only(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    whole = term(onto, tuned)
    instruction = TaskVector.between(save(tmp_path / "base", 2), onto, kind="instruction")
    weighted = whole.vector.weighted(align(whole.vector, instruction), "linear")
    merge(onto, [Term(weighted, 1.0, tuned)], tmp_path / "out", vocabulary="union")
    found, one, other = arrays(tmp_path / "out"), arrays(onto), arrays(tuned)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(found[name], np.concatenate([one[name], other[name][24:]]))


@pytest.mark.parametrize("vocabulary", ["union", "onto"])
def test_rows_that_only_onto_has_stay_as_they_are(tmp_path, vocabulary):
    onto, tuned = save(tmp_path / "onto", 0, ["<call>", "<end>"]), save(tmp_path / "tuned", 1)
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary=vocabulary, note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24)))
    assert said == [f"{tuned} lacks 2 rows from 24 on ('<call>', '<end>') of {onto}: they stay as they are"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<end>")["input_ids"] == [25]


@pytest.mark.parametrize("vocabulary", ["union", "onto"])
def test_with_one_vocabulary_nothing_changes(tmp_path, vocabulary):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1)
    said = []
    merge(onto, [term(onto, tuned, 0.7)], tmp_path / "out", vocabulary=vocabulary, note=said.append)
    merge(onto, [Term(TaskVector.between(onto, tuned), 0.7)], tmp_path / "plain")
    assert same_bits(read_back(tmp_path / "out"), read_back(tmp_path / "plain"))
    assert said == []
    one, other = (json.loads((tmp_path / name / "merge.json").read_text()) for name in ("out", "plain"))
    assert one == other
    assert one["vocabulary"] is None


@pytest.mark.parametrize("vocabulary", ["union", "onto"])
@pytest.mark.parametrize(("onto_rows", "tuned_rows"), [(24, 64), (64, 24), (32, 64)])
def test_padding_is_no_token_and_never_makes_a_model_larger(tmp_path, vocabulary, onto_rows, tuned_rows):
    onto, tuned = save(tmp_path / "onto", 0, rows=onto_rows), save(tmp_path / "tuned", 1, rows=tuned_rows)
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary=vocabulary, note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(min(onto_rows, tuned_rows))))
    assert said == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == onto_rows


@pytest.mark.parametrize(("onto_rows", "tuned_rows"), [(32, 32), (32, 25), (32, 64)])
def test_a_token_in_a_row_of_padding_is_new(tmp_path, onto_rows, tuned_rows):
    onto, tuned = save(tmp_path / "onto", 0, rows=onto_rows), save(tmp_path / "tuned", 1, ["<call>"], rows=tuned_rows)
    shared = [row for row in range(min(onto_rows, tuned_rows)) if row != 24]
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "union", vocabulary="union")
    equal(arrays(tmp_path / "union"), summed(onto, tuned, 0.5, shared, [24]))
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "onto-only", vocabulary="onto")
    equal(arrays(tmp_path / "onto-only"), summed(onto, tuned, 0.5, shared))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "union")) == 25
    assert len(AutoTokenizer.from_pretrained(tmp_path / "onto-only")) == 24
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "union").config.vocab_size == 32


@pytest.mark.parametrize(("onto_tokens", "tuned_tokens"), [([], ["<a>"]), (["<a>"], [])])
def test_a_difference_between_a_token_and_padding_is_none(tmp_path, onto_tokens, tuned_tokens):
    onto, tuned = save(tmp_path / "onto", 0, onto_tokens, rows=32), save(tmp_path / "tuned", 1, tuned_tokens, rows=32)
    shared = [row for row in range(32) if row != 24]
    one, other = arrays(onto), arrays(tuned)
    expected = other[HEAD] - one[HEAD]
    expected[24] = 0
    for side in ("start", "tuned"):
        np.testing.assert_array_equal(between_vocabularies(onto, tuned, side)[0][HEAD].numpy(), expected)
    # Nor does a vector count there that was saved without regard to tokens, as one of weights in memory is.
    saved = TaskVector.between(read_back(onto), read_back(tuned)).save(tmp_path / "vector")
    for vocabulary in ("union", "onto"):
        output = tmp_path / f"out-{vocabulary}"
        merge(onto, [Term(saved, 0.5, tuned)], output, vocabulary=vocabulary)
        equal(arrays(output), summed(onto, tuned, 0.5, shared, [24] if tuned_tokens and vocabulary == "union" else []))


def test_padding_beyond_new_tokens_comes_along(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"], rows=32)
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union")
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), range(24, 32)))


def test_tokens_of_two_tuned_models_come_together_and_the_first_gives_those_that_both_add(tmp_path):
    onto = save(tmp_path / "onto", 0)
    one, other = save(tmp_path / "one", 1, ["<a>"], rows=32), save(tmp_path / "other", 2, ["<a>", "<b>"])
    said = []
    merge(onto, [term(onto, one, 0.5), term(onto, other, 0.25)], tmp_path / "out", vocabulary="union", note=said.append)
    found, start, first, second = (arrays(path) for path in (tmp_path / "out", onto, one, other))
    for name in start:
        if name in (EMBEDDING, HEAD):
            moved = start[name] + 0.5 * (first[name][:24] - start[name]) + 0.25 * (second[name][:24] - start[name])
            # Row 24 is <a> of the first, 25 is <b> of the second although the first has padding there, the rest is padding.
            expected = np.concatenate([moved, first[name][24:25], second[name][25:26], first[name][26:]])
        else:
            expected = start[name] + 0.5 * (first[name] - start[name]) + 0.25 * (second[name] - start[name])
        np.testing.assert_array_equal(found[name], expected)
    assert said == [
        f"only {one} has row 24 ('<a>'): they are taken from it",
        f"only {other} has row 25 ('<b>'): they are taken from it",
        f"{other} adds rows that a model before it adds too: they are taken from the first",
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<a> <b>")["input_ids"] == [24, 25]


def test_a_vector_of_one_vocabulary_keeps_its_rows_where_another_model_adds_some(tmp_path):
    onto, same, more = save(tmp_path / "onto", 0, ["<own>"]), save(tmp_path / "same", 1, ["<own>"]), save(tmp_path / "less", 2)
    vector = TaskVector.between(onto, same).save(tmp_path / "vector")
    merge(onto, [Term(vector, 0.5), term(onto, more, 0.0)], tmp_path / "out", vocabulary="union")
    equal(arrays(tmp_path / "out"), summed(onto, same, 0.5, range(25)))


def test_the_order_of_sides_with_other_tokenizers_is_refused_by_name(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0, ["<x>", "<y>"]), save(tmp_path / "tuned", 1, ["<y>", "<x>", "<z>"])
    with pytest.raises(
        LayoutMismatchError, match=r"same token at the same row; 2 rows differ, first: 24 is '<x>' and '<y>', 25 is '<y>' and '<x>'"
    ):
        term(onto, tuned)


def test_two_tuned_models_that_add_other_tokens_at_the_same_rows_are_a_conflict(tmp_path):
    onto = save(tmp_path / "onto", 0)
    terms = [term(onto, save(tmp_path / name, 1, [f"<{name}>"])) for name in ("one", "other")]
    with pytest.raises(LayoutMismatchError, match=r"1 rows differ, first: 24 is '<one>' and '<other>'"):
        merge(onto, terms, tmp_path / "out", vocabulary="union")
    merge(onto, terms, tmp_path / "out", vocabulary="onto")
    assert len(arrays(tmp_path / "out")[HEAD]) == 24


def test_a_union_for_which_no_tokenizer_knows_all_tokens_is_refused(tmp_path):
    onto, one, other = save(tmp_path / "onto", 0), save(tmp_path / "one", 1, ["<a>"]), save(tmp_path / "other", 2, rows=26)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["<b>"] = 25
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LayoutMismatchError, match=r"one tokenizer that knows all tokens; that of .*one, the largest, lacks 1: \['<b>'\]"):
        merge(onto, [term(onto, one), term(onto, other)], tmp_path / "out", vocabulary="union")


def test_tokens_for_which_a_model_has_no_row_do_not_count(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    tokenizer(["<x>", "<y>"]).save_pretrained(onto)
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union")
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), [24]))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<call>")["input_ids"] == [24]


# Models without tokenizers


@pytest.mark.parametrize("without", ["onto", "tuned"])
def test_without_a_tokenizer_rows_are_matched_by_number_and_the_note_says_so(tmp_path, without):
    onto = save(tmp_path / "onto", 0, tokens=without != "onto")
    tuned = save(tmp_path / "tuned", 1, ["<call>"], tokens=without != "tuned")
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union", note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), [24]))
    label = onto if without == "onto" else tuned
    assert said[0] == f"{label} has no tokenizer files: rows are taken to be the same token where they have the same number"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == (25 if without == "onto" else 24)
    assert ("has no token for every new row" in said[-1]) == (without == "tuned")


def test_models_without_any_tokenizer_are_merged_by_number(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0, tokens=False), save(tmp_path / "tuned", 1, rows=26, tokens=False)
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union", note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), [24, 25]))
    assert said[1] == f"only {tuned} has 2 rows from 24 on: they are taken from it"


def test_a_tokenizer_that_cannot_be_read_is_named_and_rows_are_matched_by_number(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    (tuned / "tokenizer.json").write_text("{")
    said = []
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="onto", note=said.append)
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24)))
    assert said[0].startswith(f"the tokenizer of {tuned} cannot be read (")
    assert "same number" in said[0]


def test_a_lightning_checkpoint_is_matched_by_number(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    checkpoint = write_checkpoint(tmp_path / "tuned.ckpt", load_file(tuned / "model.safetensors"))
    merge(onto, [term(onto, checkpoint, 0.5)], tmp_path / "out", vocabulary="union")
    equal(arrays(tmp_path / "out"), summed(onto, tuned, 0.5, range(24), [24]))


# Saved vectors


def test_a_saved_vector_with_more_rows_gives_what_onto_has_room_for(tmp_path):
    onto, start, tuned = save(tmp_path / "onto", 0), save(tmp_path / "start", 1, ["<call>"]), save(tmp_path / "tuned", 2, ["<call>"])
    vector = TaskVector.between(start, tuned).save(tmp_path / "vector")
    said = []
    merge(onto, [Term(vector, 0.5)], tmp_path / "out", vocabulary="onto", note=said.append)
    found, one, first, second = (arrays(path) for path in (tmp_path / "out", onto, start, tuned))
    for name in one:
        np.testing.assert_array_equal(found[name], one[name] + 0.5 * (second[name] - first[name])[: len(one[name])])
    assert said == [
        f"only {tmp_path / 'vector'} has row 24 ('<call>'): they are dropped",
    ]
    with pytest.raises(
        LayoutMismatchError, match=r"vector has 25 rows and .*onto 24: a vector holds differences, so a union cannot take the new rows"
    ):
        merge(onto, [Term(vector, 0.5)], tmp_path / "union", vocabulary="union")
    merge(onto, [Term(vector, 0.5, tuned)], tmp_path / "union", vocabulary="union")
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(arrays(tmp_path / "union")[name], np.concatenate([found[name], second[name][24:]]))


@pytest.mark.parametrize("vocabulary", ["union", "onto"])
def test_a_saved_vector_with_fewer_rows_leaves_the_others_alone(tmp_path, vocabulary):
    onto, start, tuned = save(tmp_path / "onto", 0, ["<own>"]), save(tmp_path / "start", 1), save(tmp_path / "tuned", 2)
    vector = TaskVector.between(start, tuned).save(tmp_path / "vector")
    merge(onto, [Term(vector)], tmp_path / "out", vocabulary=vocabulary)
    found, one, first, second = (arrays(path) for path in (tmp_path / "out", onto, start, tuned))
    np.testing.assert_array_equal(found[HEAD][:24], one[HEAD][:24] + second[HEAD] - first[HEAD])
    np.testing.assert_array_equal(found[HEAD][24:], one[HEAD][24:])


def test_forgetting_takes_shared_rows_off_and_is_the_negated_merge(tmp_path):
    target, unwanted = save(tmp_path / "target", 0), save(tmp_path / "unwanted", 1, ["<call>"])
    for vocabulary, extra in (("onto", []), ("union", [24])):
        forget(target, term(target, unwanted, 0.5), tmp_path / vocabulary, vocabulary=vocabulary)
        equal(arrays(tmp_path / vocabulary), summed(target, unwanted, -0.5, range(24), extra))


# Vectors between different vocabularies


def test_a_vector_with_the_tokens_of_the_start_has_zero_where_tuned_lacks_them_and_drops_the_rest(tmp_path):
    for start_tokens, tuned_tokens, size in ((["<a>"], [], 25), ([], ["<a>"], 24)):
        start = save(tmp_path / f"start{size}", 0, start_tokens)
        tuned = save(tmp_path / f"tuned{size}", 1, tuned_tokens)
        vector, notes = between_vocabularies(start, tuned, "start")
        one, other = arrays(start), arrays(tuned)
        expected = np.zeros((size, 8))
        expected[:24] = other[HEAD][:24] - one[HEAD][:24]
        np.testing.assert_array_equal(vector[HEAD].numpy(), expected)
        np.testing.assert_array_equal(vector.read_slice(HEAD, (slice(20, size), slice(0, 3))).numpy(), expected[20:, :3])
        assert vector.shape(HEAD) == (size, 8)
        lacking, what = (start, "zero") if start_tokens else (tuned, "left out")
        assert notes == (f"only {lacking} has row 24 ('<a>'): no difference is known there, they are {what} in the vector",)


def test_a_vector_with_the_tokens_of_tuned_is_zero_where_the_start_lacks_them(tmp_path):
    base, instruct = save(tmp_path / "base", 0, dtype=torch.bfloat16), save(tmp_path / "instruct", 1, ["<user>"])
    vector, _ = between_vocabularies(base, instruct, "tuned", kind="instruction")
    one, other = arrays(base), arrays(instruct)
    np.testing.assert_array_equal(vector[EMBEDDING].numpy(), np.concatenate([other[EMBEDDING][:24] - one[EMBEDDING], np.zeros((1, 8))]))
    assert (vector.manifest.kind, vector.start) == ("instruction", "base")


@pytest.mark.parametrize("vocabulary", ["start", "tuned"])
def test_a_saved_vector_over_shared_rows_names_both_sides_by_all_they_hold(tmp_path, vocabulary):
    start, tuned = save(tmp_path / "start", 0), save(tmp_path / "tuned", 1, ["<a>"])
    vector, _ = between_vocabularies(start, tuned, vocabulary)
    saved = vector.save(tmp_path / "vector").manifest
    assert saved.start_identity.content_hash == TaskVector.between(start, start).save(tmp_path / "one").manifest.start_identity.content_hash
    assert (
        saved.tuned_identity.content_hash == TaskVector.between(tuned, tuned).save(tmp_path / "other").manifest.start_identity.content_hash
    )
    assert between_vocabularies(start, tuned, vocabulary)[0].tensors.content_hashes() == (None, None)


def test_an_unknown_side_or_choice_is_refused_with_the_choices(tmp_path):
    with pytest.raises(LataError, match="unknown vocabulary 'both'; choose one of start, tuned"):
        between_vocabularies(weights(0), weights(1), "both")
    with pytest.raises(LataError, match="unknown vocabulary 'both'; choose one of union, onto"):
        merge(weights(0), [Term(TaskVector.between(weights(0), weights(1)))], tmp_path / "out", vocabulary="both")


def test_an_instruction_vector_is_brought_to_the_rows_of_a_vector(tmp_path):
    base, instruct, tuned = save(tmp_path / "base", 0), save(tmp_path / "instruct", 1), save(tmp_path / "tuned", 2, ["<a>"])
    instruction = TaskVector.between(base, instruct, kind="instruction")
    vector, _ = between_vocabularies(instruct, tuned, "tuned")
    found = resized(instruction, vector, open_source(instruct).config)
    np.testing.assert_array_equal(found[HEAD].numpy(), np.concatenate([arrays(instruct)[HEAD] - arrays(base)[HEAD], np.zeros((1, 8))]))
    one, _ = between_vocabularies(instruct, tuned, "start")
    assert align(vector, found).values == align(one, instruction).values
    assert resized(instruction, one, None) is instruction
    foreign = TaskVector.between(weights(0), weights(1))
    assert resized(foreign, vector, None) is foreign


# What the vocabulary is


def test_biases_of_the_head_have_the_axis_of_the_vocabulary_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    for name, size in (("onto", 40), ("tuned", 43)):
        model = BertForMaskedLM(BertConfig(vocab_size=size, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.round(torch.randn_like(parameter) * 64) / 1024)
        model.save_pretrained(tmp_path / name)
    onto, tuned = tmp_path / "onto", tmp_path / "tuned"
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union")
    one, other, found = (arrays(path) for path in (onto, tuned, tmp_path / "out"))
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        np.testing.assert_array_equal(found[name], np.concatenate([one[name] + 0.5 * (other[name][:40] - one[name]), other[name][40:]]))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").cls.predictions.bias.shape == (43,)


def test_a_vocabulary_on_the_last_axis_is_merged_along_it(tmp_path):
    sides = {}
    for name, size in (("onto", 5), ("tuned", 7)):
        tensors = weights(len(name), vocabulary=size, step=2.0**-10) | {"final_logits_bias": torch.arange(size).float().reshape(1, size)}
        sides[name] = write_model(tmp_path / name, tensors, config={"vocab_size": size})
    merge(sides["onto"], [term(sides["onto"], sides["tuned"], 0.5)], tmp_path / "out", vocabulary="union")
    assert read_back(tmp_path / "out")["final_logits_bias"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_the_vocabulary_of_a_nested_config_is_found_and_changed_where_it_belongs(tmp_path):
    sides = {}
    for name, size in (("onto", 6), ("tuned", 8)):
        config = {"text_config": {"vocab_size": size, "width": 6}, "audio_config": {"vocab_size": 6}, "hidden_size": 6}
        sides[name] = write_model(tmp_path / name, weights(len(name), vocabulary=size), config=config)
    merge(sides["onto"], [term(sides["onto"], sides["tuned"])], tmp_path / "out", vocabulary="union")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "model_type": "made-up", "text_config": {"vocab_size": 8, "width": 6}, "audio_config": {"vocab_size": 6}, "hidden_size": 6,
    }  # fmt: skip


def test_the_dtype_and_the_size_are_written_into_one_config(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    merge(onto, [term(onto, tuned)], tmp_path / "out", vocabulary="union", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.dtype, model.config.vocab_size) == (torch.bfloat16, 25)


def test_new_rows_of_a_finer_precision_are_rounded_once_to_that_of_the_output(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0, dtype=torch.bfloat16), save(tmp_path / "tuned", 1, ["<call>"])
    finer = {name: tensor / 3 for name, tensor in load_file(tuned / "model.safetensors").items()}
    save_file(finer, tuned / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "float32"):
        merge(onto, [term(onto, tuned, 0.0)], tmp_path / f"out-{dtype}", vocabulary="union", dtype=dtype)
        found = read_back(tmp_path / f"out-{dtype}")[HEAD]
        assert found.dtype == (torch.bfloat16 if dtype is None else torch.float32)
        assert torch.equal(found[:24].float(), read_back(onto)[HEAD].float())
        assert torch.equal(found[24], finer[HEAD][24].to(found.dtype))


def test_the_record_and_the_card_tell_what_became_of_the_rows(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    merge(onto, [term(onto, tuned)], tmp_path / "out", vocabulary="union")
    sentence = f"only {tuned} has row 24 ('<call>'): they are taken from it"
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["vocabulary"] == {"rows_of": "union", "before": 24, "after": 25, "notes": [sentence]}
    assert record["onto"]["content_hash"] == TaskVector.between(onto, onto).save(tmp_path / "v").manifest.start_identity.content_hash
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Vocabulary: 24 rows before, 25 after." in card
    assert sentence in card


# Refusals


def test_by_default_other_vocabularies_are_refused_and_the_option_is_named(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    with pytest.raises(
        LayoutMismatchError, match=r"must have the same vocabulary; .* 24 rows in one and 25 in the other\. Resize .* \(--vocabulary of"
    ):
        TaskVector.between(onto, tuned)


def test_weights_of_which_no_config_tells_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(
        LayoutMismatchError, match=r"names 6 or 9 as vocab_size, .* differs in 2: .* Give one of them as a Hugging Face directory"
    ):
        between_vocabularies(weights(0), weights(1, vocabulary=9), "start")


def test_a_table_of_positions_is_no_vocabulary(tmp_path):
    sides = []
    for name, size in (("start", 12), ("tuned", 16)):
        tensors = weights(0) | {"model.embed_positions.weight": torch.zeros(size, 4)}
        sides.append(write_model(tmp_path / name, tensors, config={"vocab_size": 6}))
    with pytest.raises(
        LayoutMismatchError, match=r"1: \['model.embed_positions.weight'\] differ in size, and 12 is not the vocab_size in the config"
    ):
        between_vocabularies(*sides, "start")


def test_other_differences_beside_the_vocabulary_are_refused(tmp_path):
    start = write_model(tmp_path / "start", weights(0), config={"vocab_size": 6})
    wide = write_model(tmp_path / "wide", weights(0, vocabulary=9, width=5), config={"vocab_size": 9})
    with pytest.raises(LayoutMismatchError, match=r"along the vocabulary only, but otherwise \d+ of \d+ tensors differs?(, first)?: \["):
        between_vocabularies(start, wide, "start")
    tensors = weights(0, vocabulary=9) | {HEAD: torch.zeros(8, 4)}
    odd = write_model(tmp_path / "odd", tensors, config={"vocab_size": 9})
    with pytest.raises(LayoutMismatchError, match=r"along the vocabulary only, but otherwise 2 of 9 tensors differ: .*lm_head.weight"):
        between_vocabularies(start, odd, "start")


def test_vectors_that_fit_neither_onto_nor_the_tuned_model_are_refused(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0), save(tmp_path / "tuned", 1, ["<call>"])
    narrow = {
        name: torch.zeros(tensor.shape[0], 5) if name == HEAD else tensor for name, tensor in load_file(onto / "model.safetensors").items()
    }
    vector = TaskVector.between(narrow, narrow)
    with pytest.raises(
        LayoutMismatchError, match=r"the same shapes but for the vocabulary; 1 of \d+ tensors differs: \['lm_head.weight'\]"
    ):
        merge(onto, [Term(vector, 1.0, tuned)], tmp_path / "out", vocabulary="union")


def test_tokens_in_the_padding_of_an_unknown_architecture_are_refused(tmp_path):
    sides = []
    for name, added in (("start", []), ("tuned", ["<call>"])):
        sides.append(save(tmp_path / name, 0, added, rows=32))
        config = json.loads((sides[-1] / "config.json").read_text())
        (sides[-1] / "config.json").write_text(json.dumps({**config, "architectures": ["Made4CausalLM"]}))
    with pytest.raises(
        LayoutMismatchError, match="their numbers of rows do not, and the config does not tell which tensors hold the vocabulary"
    ):
        between_vocabularies(*sides, "start")


def test_rows_of_factors_are_those_of_the_matrix_they_make():
    # Small integers, whose products no order of summing rounds.
    left, right = torch.randint(-4, 5, (4, 2)).float(), torch.randint(-4, 5, (2, 3)).float()
    matrices = StateDictSource({"embedding": left @ right, "other": left @ right})
    held = InFactors(matrices, {"embedding": (left, right), "other": (left, right)})
    found = AssembledRows(held, {"embedding": 0}, 6, [(held, range(3))])
    assert found.low_rank("embedding") is None
    assert found.low_rank("other") is not None
    assert torch.equal(found.read("embedding"), torch.cat([(left @ right)[:3], torch.zeros(3, 3)]))
    assert torch.equal(found.read_slice("other", (slice(1, 2), slice(0, 3))), (left @ right)[1:2])


def test_shards_and_stored_copies_of_tied_weights_are_merged_as_one(tmp_path):
    onto, tuned = save(tmp_path / "onto", 0, tied=True), save(tmp_path / "tuned", 1, ["<call>"], tied=True)
    twice = load_file(tuned / "model.safetensors")
    save_file(twice | {HEAD: twice[EMBEDDING].clone()}, tuned / "model.safetensors", metadata={"format": "pt"})
    merge(onto, [term(onto, tuned, 0.5)], tmp_path / "out", vocabulary="union")
    assert set(arrays(tmp_path / "out")) == set(arrays(onto))
    assert len(arrays(tmp_path / "out")[EMBEDDING]) == 25
