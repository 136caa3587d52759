"""Which token each row stands for; expected values from transformers' own tokenizers."""

# ruff: noqa: S106 (what is given are tokens of texts)

import json
import sys

import pytest
import transformers
from blake3 import blake3
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lata_lightning.store.tokens import LAST, TokenizerIdentity, hash_of_tokens, read_tokens

TEXT = ["hello world, this is some text to train a tokenizer with", "more words, and other words"] * 5
TRAINED = {
    "bpe": lambda: (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=60, special_tokens=["[UNK]"])),
    "unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(vocab_size=40, special_tokens=["[UNK]"], unk_token="[UNK]")),
    "word pieces": lambda: (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"])),
    "words": lambda: (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]"])),
}


def save(directory, kind="words", added=("<a>", "<b>"), **special):
    model, trainer = TRAINED[kind]()
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TEXT, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)
    found.add_tokens(list(added))
    found.save_pretrained(directory)
    return directory


def vocabulary(directory, rows=None):
    return TokenizerIdentity.of_directory(directory, "it", rows)


def recorded(found):
    return TokenizerIdentity.from_json(json.loads(json.dumps(found.to_json())))


@pytest.mark.parametrize("kind", TRAINED)
def test_the_rows_are_those_of_the_tokenizer_that_transformers_makes(tmp_path, monkeypatch, kind):
    save(tmp_path, kind, pad_token="<pad>")
    expected = {row: token for token, row in AutoTokenizer.from_pretrained(tmp_path).get_vocab().items()}
    # Without making one.
    monkeypatch.delattr(transformers, "AutoTokenizer")
    assert read_tokens(tmp_path, "it").by_row == expected
    found = vocabulary(tmp_path)
    assert (found.count, found.hash) == (len(expected), hash_of_tokens(expected))


def test_tokens_listed_beside_the_tokenizer_count_once(tmp_path):
    save(tmp_path, added=())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    known = read_tokens(tmp_path, "it").by_row
    settings["added_tokens_decoder"] = {"0": {"content": known[0]}, str(len(known)): {"content": "<late>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokens(tmp_path, "it").by_row == {**known, len(known): "<late>"}


def test_a_gpt2_vocabulary_in_two_files_is_read_as_it_lists_it(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 3}))
    assert read_tokens(tmp_path, "it").by_row == {0: "a", 1: "b", 2: "ab", 3: "<x>"}


def test_the_hash_is_that_of_the_text_in_the_format():
    assert hash_of_tokens({1: "né", 0: "a"}) == "blake3:" + blake3("0:1:a\n1:2:né\n".encode()).hexdigest()


def test_roles_templates_and_padding_settings_are_no_vocabulary(tmp_path):
    one, other = save(tmp_path / "one"), save(tmp_path / "other", bos_token="[UNK]", chat_template="{{ messages }}")
    content = json.loads((other / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary(one).files != vocabulary(other).files
    assert vocabulary(one) == vocabulary(other)


def test_another_token_another_order_and_one_token_more_are_other_vocabularies(tmp_path):
    one = vocabulary(save(tmp_path / "one"))
    for number, added in enumerate([("<b>", "<a>"), ("<a>", "<c>"), ("<a>",), ("<a>", "<b>", "<c>")]):
        other = vocabulary(save(tmp_path / str(number), added=added))
        assert one != other
        assert recorded(one) != other
    assert recorded(one) == one


def test_tokens_without_a_row_do_not_count(tmp_path):
    one, other = save(tmp_path / "one", added=()), save(tmp_path / "other", added=("<a>",))
    count = len(read_tokens(one, "it").by_row)
    assert vocabulary(one, count) == vocabulary(other, count)
    assert vocabulary(one, count) != vocabulary(other, count + 1)


def test_files_of_equal_bytes_are_compared_without_reading_them_as_tokens(tmp_path, monkeypatch):
    one, other = vocabulary(save(tmp_path / "one")), vocabulary(save(tmp_path / "other"))
    monkeypatch.setattr(sys.modules["lata_lightning.store.tokens"], "read_tokens", lambda *_: pytest.fail("the tokens were read"))
    assert one == other


def test_what_is_recorded_tells_the_tokens_beside_a_tokenizer_that_begins_alike(tmp_path):
    words = {f"w{row}": row for row in range(LAST + 40)}
    inner = Tokenizer(models.WordLevel(words))
    for name, added in (("one", ["<a>"]), ("other", ["<b>", "<c>"])):
        found = PreTrainedTokenizerFast(tokenizer_object=inner.from_str(inner.to_str()))
        found.add_tokens(added)
        found.save_pretrained(tmp_path / name)
    one, other = vocabulary(tmp_path / "one"), vocabulary(tmp_path / "other")
    assert len(recorded(one).to_json()["last"]) == LAST
    assert recorded(one).compared_with(other) == one.tokens.by_row
    assert recorded(other).compared_with(one) == other.tokens.by_row
    assert other.compared_with(recorded(one)) == other.tokens.by_row
    # Two that are recorded begin at other rows here, so nothing is known.
    assert recorded(one).compared_with(recorded(other)) is None
    assert recorded(one).compared_with(recorded(one))[len(words)] == "<a>"


def test_a_tokenizer_that_begins_otherwise_tells_nothing(tmp_path):
    for name, first in (("one", "x"), ("other", "y")):
        inner = Tokenizer(models.WordLevel({f"{first}{row}": row for row in range(LAST + 40)}))
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / name)
    assert recorded(vocabulary(tmp_path / "one")).compared_with(vocabulary(tmp_path / "other")) is None


def test_a_tokenizer_that_cannot_be_read_is_equal_to_the_same_files_only(tmp_path):
    for name, content in (("one", b"\x00one"), ("same", b"\x00one"), ("other", b"\x00other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    one, same, other = (vocabulary(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one != other
    assert one.to_json()["hash"] is None
    assert "cannot be read" in one.tokens.unknown
    assert recorded(one) == one


@pytest.mark.parametrize("files", [(), ("config.json",), ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")])
def test_a_directory_without_a_vocabulary_has_none(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert vocabulary(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"model": {}}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {"\\ud800": 0}}}',
        '{"model": {"vocab": [1, 2]}}',
    ],
)
def test_a_damaged_tokenizer_is_said_to_be_unreadable_and_raises_nothing(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    assert "the tokenizer of it cannot be read" in read_tokens(tmp_path, "it").unknown
