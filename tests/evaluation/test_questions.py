import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.evaluation.accuracy import exact_match
from lata_lightning.evaluation.answers import AnswerPerplexity
from lata_lightning.evaluation.questions import Question, distinct, names_of, prepare, read_data, read_questions
from lata_lightning.quickstart.experts import INSTRUCT


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT)


@pytest.fixture
def write(tmp_path):
    def written(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8")
        return path

    return written


def test_rows_are_read_in_every_form(write):
    path = write(
        {"prompt": "copy a", "answer": "a"},
        "",
        {"question": "copy b", "answer": "b", "paraphrased_answer": "it is b", "perturbed_answer": ["c", "d"]},
        {"messages": [{"role": "user", "content": "copy \u2028"}, {"role": "assistant", "content": "\u2028"}], "perturbed_answer": "x"},
    )
    assert read_questions(path) == [
        Question("copy a", "a"),
        Question("copy b", "b", "it is b", ("c", "d")),
        Question("copy \u2028", "\u2028", None, ("x",)),
    ]


def test_exact_match_on_a_file_is_that_of_its_pairs(write, model, tokenizer):
    pairs = [("copy tobik", "tobik"), ("copy tobik", "tobi"), ("copy lemu", "lemu")]
    path = write(*({"prompt": prompt, "answer": answer} for prompt, answer in pairs))
    assert prepare("exact_match", tokenizer, path)(model) == exact_match(model, tokenizer, pairs) == pytest.approx(2 / 3)


def test_perplexity_of_texts_weighs_every_token_the_same(write, model, tokenizer):
    texts = ["A first paragraph.", "And a second one.", "x"]
    losses = []
    for text in texts[:2]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append((model(input_ids=ids, labels=ids).loss.double().item(), ids.shape[1] - 1))
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    path = write(*({"text": text} for text in texts))
    assert prepare("perplexity", tokenizer, path)(model) == pytest.approx(math.exp(mean), rel=1e-5)
    assert prepare(None, tokenizer, path)(model) == pytest.approx(math.exp(mean), rel=1e-5)


def test_perplexity_of_questions_is_that_of_the_answers(write, model, tokenizer):
    path = write({"prompt": "copy tobik", "answer": "tobi"})
    assert prepare("perplexity", tokenizer, path)(model) == AnswerPerplexity(tokenizer, [("copy tobik", "tobi")])(model) > 2


def test_equal_rows_count_once(write):
    assert distinct(read_data(write({"text": "a", "id": 1}, {"id": 2, "text": "a"}, {"text": "b", "id": 1}))) == 2


def test_files_are_named_without_their_ending():
    assert names_of(["a/math.jsonl", "b/text.json"]) == {"math": "a/math.jsonl", "text.json": "b/text.json"}
    with pytest.raises(LataError, match=r"files need different names; the same are 1: \['math'\]"):
        names_of(["a/math.jsonl", "b/math.jsonl"])


@pytest.mark.parametrize("row", [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "answer": "b", "perturbed_answer": [1]}])
def test_rows_that_are_no_question_with_an_answer_are_named(write, row):
    with pytest.raises(LataError, match=f"others are 1: \\['row 2: {', '.join(row)}'\\]"):
        read_questions(write({"prompt": "a", "answer": "b"}, row))


def test_a_metric_that_does_not_suit_the_rows_is_refused(write, tokenizer):
    with pytest.raises(
        LataError, match=r"exact_match cannot be taken on .*: it needs questions with answers.* suit perplexity \(--metric\)"
    ):
        prepare("exact_match", tokenizer, write({"text": "a"}))
    with pytest.raises(LataError, match=r"exact_match cannot be taken on .* These rows suit accuracy or perplexity"):
        prepare("exact_match", tokenizer, write({"text": "a", "label": 1}))
    with pytest.raises(LataError, match="accuracy cannot be taken on .*: it needs texts with a label"):
        prepare("accuracy", tokenizer, write({"prompt": "a", "answer": "b"}))


def test_files_that_are_no_jsonl_are_refused(write, tmp_path):
    with pytest.raises(SourceError, match=r"there is no file .*absent\.jsonl"):
        read_data(tmp_path / "absent.jsonl")
    with pytest.raises(CorruptFileError, match="line 2 of .* is no JSON"):
        read_data(write({"text": "a"}, "{"))
    with pytest.raises(CorruptFileError, match="line 1 of .* must be a JSON object, it is a list"):
        read_data(write([1]))
    with pytest.raises(LataError, match="holds no rows"):
        read_data(write(""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(CorruptFileError, match="is no UTF-8 text"):
        read_data(tmp_path / "latin.jsonl")


def test_an_unknown_metric_is_refused(write, tokenizer):
    with pytest.raises(LataError, match="unknown metric 'bleu'; choose one of exact_match, perplexity, accuracy"):
        prepare("bleu", tokenizer, write({"text": "a"}))
