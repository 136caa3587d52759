"""JSON files that hold a hash of themselves; the expected hash is formed by hand."""

import json

import pytest
from blake3 import blake3

from lata_lightning.errors import CorruptFileError
from lata_lightning.store.seal import check_seal, sealed

DATA = {"coefficients": {"b": 0.5}, "name": "né", "list": [1, 2.0]}


def test_the_hash_is_that_of_the_bytes_with_its_digits_set_to_zero():
    text = sealed(DATA)
    stated = json.loads(text)["self_hash"]
    assert list(json.loads(text)) == [*DATA, "self_hash"]
    assert stated == "blake3:" + blake3(text.replace(stated, "blake3:" + 64 * "0").encode()).hexdigest()
    check_seal(text, "it")


@pytest.mark.parametrize(("old", "new"), [("0.5", "0.75"), ('"b"', '"c"'), ("2.0", "2"), ("né", "ne"), ("\n  ", "\n"), ("]", ", 3]")])
def test_any_edit_is_noticed(old, new):
    text = sealed(DATA)
    assert old in text
    with pytest.raises(CorruptFileError, match=r"it was edited after it was written: its content does not match the hash in its self_hash"):
        check_seal(text.replace(old, new), "it")


@pytest.mark.parametrize("text", [json.dumps(DATA), json.dumps({**DATA, "self_hash": None}), json.dumps({**DATA, "self_hash": 3})])
def test_a_file_without_its_hash_is_refused(text):
    with pytest.raises(CorruptFileError, match="it holds no hash of itself"):
        check_seal(text, "it")


def test_content_that_looks_like_the_blank_hash_does_not_disturb():
    blank = "blake3:" + 64 * "0"
    check_seal(sealed({"self": {"self_hash": blank}, "other": blank}), "it")
