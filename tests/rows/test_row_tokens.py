import json

import pytest
import torch
from tokenizers_of_kinds import KINDS, bare, chatml, gemma

from lata_lightning.errors import LataError
from lata_lightning.rows.inputs import tokenised
from lata_lightning.rows.schema import Sample, pair, read_sample
from lata_lightning.rows.tokens import IGNORED, conversation_row, raw_tokens, special_tokens, text_windows
from lata_lightning.training.text_data import TextDataModule

TURNS = [
    {"role": role, "content": content} for role, content in (("user", "hi you"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok"))
]


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("text", ["a", "some words", "ünïcode"])
def test_a_text_that_fits_is_what_the_tokenizer_gives(tokenizer, text):
    assert text_windows(tokenizer, text, 64) == [tokenizer(text)["input_ids"]]
    assert tokenised([Sample("text", text=text)], tokenizer)[0][0].tolist() == tokenizer(text)["input_ids"]


def test_special_tokens_are_those_around_a_text():
    found = {name: [kind().convert_ids_to_tokens(side) for side in special_tokens(kind())] for name, kind in KINDS.items()}
    assert found == {"gemma": [["<bos>"], []], "chatml": [[], []], "bare": [["<s>"], []], "bert": [["[CLS]"], ["[SEP]"]]}


def test_every_window_of_a_long_text_begins_as_a_text_does(tokenizer):
    before, after = special_tokens(tokenizer)
    windows = text_windows(tokenizer, "abcdefghij", 4)
    assert all(window[: len(before)] == before for window in windows)
    assert max(map(len, windows)) == 4
    content = [token for window in windows for token in window[len(before) :]]
    assert before + content == tokenizer("abcdefghij")["input_ids"]
    assert content[len(content) - len(after) :] == after


def test_an_end_token_is_put_once(tokenizer):
    (window,) = text_windows(tokenizer, "abc", 64, end=True)
    assert window.count(tokenizer.eos_token_id) == 1
    assert window[-1] == tokenizer.eos_token_id
    # The end alone would be a window that predicts nothing.
    size = 3 + len(special_tokens(tokenizer)[0])
    assert len(text_windows(tokenizer, "abc", size, end=True)) == 1
    assert text_windows(tokenizer, "", 8, end=True) == []


def test_a_window_that_special_tokens_fill_is_refused():
    with pytest.raises(LataError, match="a window of 1 tokens is filled by the 1 that the tokenizer puts first"):
        text_windows(gemma(), "abc", 1)


@pytest.mark.parametrize("kind", [gemma, chatml, bare])
def test_a_conversation_is_what_transformers_renders_and_bos_comes_once(kind):
    tokenizer = kind()
    row = conversation_row(tokenizer, Sample("conversation", tuple(TURNS)), "row 1")
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    if kind is gemma:
        assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    learned = tokenizer.decode(row.labels[row.labels != IGNORED])
    assert learned == {gemma: "yo<end_of_turn>\nok<end_of_turn>\n", chatml: "yo<|im_end|>\nok<|im_end|>\n", bare: "yo\nok\n"}[kind]


@pytest.mark.parametrize("kind", [gemma, chatml, bare])
def test_a_plain_pair_begins_as_a_text_does_and_ends_with_the_end_token(kind):
    tokenizer = kind()
    row = conversation_row(tokenizer, pair("2+2=", "4"), "row 1", "plain")
    assert row.input_ids.tolist() == [*tokenizer("2+2=4")["input_ids"], tokenizer.eos_token_id]
    assert row.labels[row.labels != IGNORED].tolist() == [*tokenizer("4", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_a_conversation_has_no_plain_form_and_pairs_need_a_chat_template():
    with pytest.raises(LataError, match="joins a prompt and its answer; row 4 holds a conversation"):
        conversation_row(gemma(), Sample("conversation", tuple(TURNS)), "row 4", "plain")
    with pytest.raises(LataError, match="has no chat template"):
        conversation_row(KINDS["bert"](), pair("a", "b"), "row 1")


def test_documents_in_one_line_of_tokens_each_begin_and_end_as_a_text(tokenizer):
    line = raw_tokens(tokenizer, ["ab", "c"], 4).tolist()
    ends = [] if special_tokens(tokenizer)[1] else [tokenizer.eos_token_id]
    assert line == [*tokenizer("ab")["input_ids"], *ends, *tokenizer("c")["input_ids"], *ends]


@pytest.mark.parametrize("name", ["gemma", "chatml"])
@pytest.mark.parametrize("row", [{"text": "a story"}, {"messages": TURNS}, {"question": "2+2", "answer": "4"}])
def test_lata_fit_and_the_samples_of_regress_have_the_same_tokens(tmp_path, name, row):
    tokenizer = KINDS[name]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = TextDataModule(str(tmp_path / "rows.jsonl"), tokenizer=str(tmp_path / "tokenizer"), context_length=128)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    sample = read_sample(row, where="row 1")
    ids = tokenised([sample], tokenizer)[0][0].tolist()
    assert batch["input_ids"][0].tolist() == (ids if "text" not in row else [*ids, tokenizer.eos_token_id])


def test_a_row_that_is_cut_keeps_what_the_tokenizer_puts_last():
    tokenizer = KINDS["bert"]()
    (ids,), cut = tokenised([Sample("text", text="abcdef")], tokenizer, max_tokens=4)
    assert ids.tolist() == tokenizer("abcdef", truncation=True, max_length=4)["input_ids"]
    assert cut == 1
    assert torch.equal(tokenised([Sample("text", text="ab")], tokenizer, max_tokens=4)[0][0], torch.tensor(tokenizer("ab")["input_ids"]))
