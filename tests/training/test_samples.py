import json

import pytest
import torch

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.training.samples import model_inputs, read_samples, tokenised


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_the_first_rows_of_a_file_are_read(tmp_path):
    rows = [{"text": str(number)} for number in range(5)]
    path = written(tmp_path / "rows.jsonl", rows)
    assert read_samples(path, 3) == rows[:3]
    assert read_samples(str(path), 9) == rows


def test_a_data_set_is_read_as_a_file_is(tmp_path):
    rows = [{"text": str(number)} for number in range(5)]
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", rows)
    assert read_samples(str(tmp_path / "set"), 3) == rows[:3]


def test_files_that_hold_no_samples_are_refused(tmp_path):
    with pytest.raises(LataError, match="at least one sample is needed, not 0"):
        read_samples(tmp_path, 0)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(LataError, match="empty holds no rows"):
        read_samples(tmp_path / "empty", 1)
    (tmp_path / "broken").write_text('{"text": "a"}\n{"text"')
    assert read_samples(tmp_path / "broken", 1) == [{"text": "a"}]
    with pytest.raises(CorruptFileError, match="line 2 of .*broken is no JSON"):
        read_samples(tmp_path / "broken", 2)
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(CorruptFileError, match="line 1 of .*list must be a JSON object, it is a list"):
        read_samples(tmp_path / "list", 1)
    with pytest.raises(SourceError, match="nowhere is neither a file nor a data set"):
        read_samples(str(tmp_path / "nowhere"), 1)


def test_the_three_forms_of_a_row_become_tokens(tokenizer):
    user, assistant, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant", "end"))
    hi, yo = tokenizer("hi")["input_ids"], tokenizer("yo")["input_ids"]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    found, cut = tokenised([{"prompt": "hi", "answer": "yo"}, {"messages": turns}, {"text": "hi", "id": 3}], tokenizer)
    chat = [user, *hi, assistant, *yo, end]
    assert [row.tolist() for row in found] == [chat, chat, hi]
    assert cut == 0


def test_long_rows_are_cut_and_counted(tokenizer):
    found, cut = tokenised([{"text": "abcdef"}, {"text": "ab"}, {"prompt": "ab", "answer": "c"}], tokenizer, max_tokens=3)
    assert [len(row) for row in found] == [3, 2, 3]
    assert cut == 2


def test_rows_without_usable_content_are_refused(tokenizer):
    with pytest.raises(LataError, match="row 2 must hold 'prompt' and 'answer', 'messages', or 'text'; it holds 'question'"):
        tokenised([{"text": "a"}, {"question": "b"}], tokenizer)
    with pytest.raises(LataError, match="row 1 has no tokens"):
        tokenised([{"text": ""}], tokenizer)
    with pytest.raises(LataError, match="at least one token, not 0"):
        tokenised([{"text": "a"}], tokenizer, max_tokens=0)
    plain = make_tokenizer()
    plain.chat_template = None
    assert len(tokenised([{"text": "a"}], plain)[0]) == 1
    with pytest.raises(LataError, match="no chat template, so rows need a 'text'"):
        tokenised([{"prompt": "a", "answer": "b"}], plain)


def test_batches_are_padded_on_the_right_and_say_so():
    batches = model_inputs([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 9])], 2)
    assert [batch["attention_mask"].tolist() for batch in batches] == [[[1, 1, 1], [1, 0, 0]], [[1, 1]]]
    assert batches[0]["input_ids"][0].tolist() == [5, 6, 7]
    assert batches[0]["input_ids"][1, 0].item() == 8
