import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.rows.inputs import model_inputs, tokenised
from lata_lightning.rows.schema import Sample, pair


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_three_forms_of_a_row_become_tokens(tokenizer):
    user, assistant, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant", "end"))
    hi, yo = tokenizer("hi")["input_ids"], tokenizer("yo")["input_ids"]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    found, cut = tokenised([pair("hi", "yo"), Sample("conversation", tuple(turns)), Sample("text", text="hi")], tokenizer)
    chat = [user, *hi, assistant, *yo, end]
    assert [row.tolist() for row in found] == [chat, chat, hi]
    assert cut == 0


def test_long_rows_are_cut_and_counted(tokenizer):
    found, cut = tokenised([Sample("text", text="abcdef"), Sample("text", text="ab"), pair("ab", "c")], tokenizer, max_tokens=3)
    assert [len(row) for row in found] == [3, 2, 3]
    assert cut == 2


def test_rows_without_usable_content_are_refused(tokenizer):
    with pytest.raises(LataError, match="row 1 of the data has no tokens"):
        tokenised([Sample("text", text="")], tokenizer)
    with pytest.raises(LataError, match="at least one token, not 0"):
        tokenised([Sample("text", text="a")], tokenizer, max_tokens=0)
    plain = make_tokenizer()
    plain.chat_template = None
    assert len(tokenised([Sample("text", text="a")], plain)[0]) == 1
    with pytest.raises(LataError, match="no chat template, .* or give rows with a 'text'"):
        tokenised([pair("a", "b")], plain)
    assert tokenised([pair("a", "b")], plain, template="plain")[0][0].tolist() == [*tokenizer("ab")["input_ids"], 256]


def test_batches_are_padded_on_the_right_and_say_so():
    batches = model_inputs([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 9])], 2)
    assert [batch["attention_mask"].tolist() for batch in batches] == [[[1, 1, 1], [1, 0, 0]], [[1, 1]]]
    assert batches[0]["input_ids"][0].tolist() == [5, 6, 7]
    assert batches[0]["input_ids"][1, 0].item() == 8
