import pytest

from lata_lightning.errors import LataError
from lata_lightning.rows.schema import FORMS, Sample, check_columns, columns_of, pair, read_sample, read_samples

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ({"messages": TURNS}, Sample("conversation", tuple(TURNS))),
        ({"prompt": "a", "completion": "b"}, pair("a", "b")),
        ({"prompt": "a", "answer": "b"}, pair("a", "b")),
        ({"question": "a", "answer": "b"}, pair("a", "b")),
        ({"question": "a", "completion": "b"}, pair("a", "b")),
        ({"text": "a"}, Sample("text", text="a")),
        ({"text": "a", "label": 3}, Sample("text", text="a", label=3)),
        ({"text": "a", "label": "spam"}, Sample("text", text="a", label="spam")),
        ({"text": "a", "label": None, "messages": None}, Sample("text", text="a")),
        ({"prompt": "p", "prompt_id": "7", "messages": TURNS}, Sample("conversation", tuple(TURNS))),
        ({"question": "a", "answer": "b", "paraphrased_answer": "c", "perturbed_answer": ["d"]}, pair("a", "b")),
    ],
)
def test_every_form_is_one_sample_and_other_columns_are_ignored(row, sample):
    assert read_sample(row, where="row 1") == sample


def test_a_pair_is_a_conversation_of_two_turns():
    assert pair("a", "b").messages == tuple(TURNS)
    assert (pair("a", "b").prompt, pair("a", "b").answer) == ("a", "b")


@pytest.mark.parametrize(
    ("row", "held"),
    [
        ({"messages": TURNS, "text": "a"}, "2: 'messages'; 'text'"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "2: 'prompt' and 'completion'; 'prompt' and 'answer'"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "2: 'prompt' and 'answer'; 'question' and 'answer'"),
        ({"question": "a", "answer": "b", "text": "c", "label": 1}, "2: 'question' and 'answer'; 'text'"),
    ],
)
def test_a_row_of_two_forms_is_refused_with_both(row, held):
    with pytest.raises(LataError, match=f"row 3 must hold one of the accepted forms, it holds {held}\\. Remove the columns"):
        read_sample(row, where="row 3")


@pytest.mark.parametrize(
    ("row", "nearest"),
    [
        ({"promt": "a", "completion": "b"}, "'prompt' and 'completion', of which 'prompt' is missing"),
        ({"prompt": "a"}, "of which 'completion' is missing"),
        ({"message": TURNS}, "'messages', of which 'messages' is missing"),
        ({"texts": "a", "label": 1}, "'text', of which 'text' is missing"),
        ({"Question": "a", "Answer": "b"}, "'question' and 'answer', of which 'question' and 'answer' are missing"),
    ],
)
def test_a_row_of_no_form_is_refused_with_what_is_accepted_and_the_nearest(row, nearest):
    with pytest.raises(
        LataError, match=r"row 1 must hold 'messages', 'prompt' and 'completion', .* or 'text' and 'label'; it holds"
    ) as caught:
        read_sample(row, where="row 1")
    assert f"The nearest form is {nearest}" in str(caught.value) or nearest in str(caught.value)


def test_a_row_without_any_value_is_refused():
    with pytest.raises(LataError, match="it holds no column"):
        read_sample({"text": None}, where="row 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": 4}, "'prompt' and 'answer' must be text; row 2 holds a int"),
        ({"prompt": "a", "answer": ""}, "row 2 has nothing in column 'answer'"),
        ({"text": ""}, "row 2 has nothing in column 'text'"),
        ({"text": ["a"]}, "'text' must be text; row 2 holds a list"),
        ({"text": "a", "label": 0.5}, "a label must be a whole number or a word; row 2 holds a float"),
        ({"text": "a", "label": True}, "a label must be a whole number or a word; row 2 holds a bool"),
        ({"messages": "a"}, "must be a list of turns with 'role' and 'content'; row 2 has none in 'messages'"),
        ({"messages": [{"from": "user", "value": "a"}]}, "must be a list of turns with 'role' and 'content'; row 2 has none"),
        ({"messages": []}, "row 2 has nothing in column 'messages'"),
    ],
)
def test_values_of_another_type_are_refused(row, message):
    with pytest.raises(LataError, match=message):
        read_sample(row, where="row 2")


def test_named_columns_replace_the_accepted_forms():
    row = {"q": "a", "a": "b", "text": "c", "talk": TURNS}
    assert read_sample(row, ["q", "a"], where="row 1") == pair("a", "b")
    assert read_sample(row, ["text"], where="row 1") == Sample("text", text="c")
    assert read_sample(row, ["talk"], where="row 1") == Sample("conversation", tuple(TURNS))
    with pytest.raises(LataError, match="row 1 has no column 'b'; its columns are 'q', 'a'"):
        read_sample({"q": "a", "a": "b"}, ["q", "b"], where="row 1")
    with pytest.raises(LataError, match="row 1 has nothing in column 'a'"):
        read_sample({"q": "a", "a": None}, ["q", "a"], where="row 1")


def test_all_rows_of_a_file_have_one_form():
    assert [sample.form for sample in read_samples([{"messages": TURNS}, {"prompt": "a", "answer": "b"}], "x")] == ["conversation", "pair"]
    for other, words in (({"text": "a"}, "a text"), ({"text": "a", "label": 1}, "a text with a label")):
        with pytest.raises(
            LataError, match=f"row 1 holds a conversation and 1 of 2 rows another, the first is row 2, which holds {words}\\."
        ):
            read_samples([{"prompt": "a", "answer": "b"}, other], "x.jsonl")
    with pytest.raises(LataError, match="row 1 holds a text with a label and 2 of 3 rows another, the first is row 2"):
        read_samples([{"text": "a", "label": 1}, {"text": "b"}, {"text": "c"}], "x.jsonl")


def test_columns_are_those_of_the_one_form_that_is_there():
    assert {columns_of([*columns, "more"]) for columns in FORMS} == set(FORMS)
    check_columns(["a", "b"], ["b"])
