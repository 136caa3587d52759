"""The data sets of experts: what is drawn by a seed, what is never both trained and tested, and files that are missing or of another form."""

import json

import pytest

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from study.real.configuration import read_configuration
from study.real.data import AUTHOR_ROWS, DATA_SETS, authors, labelled, read, rows_of
from study.real.tiny import tiny_configuration


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_configuration(read_configuration("smollm2_135m"), tmp_path_factory.mktemp("tiny"))[1]


@pytest.mark.parametrize("name", [name for name, kind in DATA_SETS.items() if not kind.facts])
def test_no_row_is_trained_and_scored(name, data):
    rows = rows_of(name, data, 0)
    assert all((rows.train, rows.validation, rows.test))
    if rows.train[0].form == "pair" and name not in ("clinc150", "banking77"):
        prompts = [{row.prompt for row in part} for part in (rows.train, rows.validation, rows.test)]
        assert len(set.union(*prompts)) == sum(map(len, prompts))


@pytest.mark.parametrize("name", ["gsm8k", "mbpp", "svamp", "django"])
def test_seeds_draw_other_training_rows_and_keep_the_test_rows(name, data):
    one, other = rows_of(name, data, 0), rows_of(name, data, 1)
    assert one.train != other.train
    assert one.test == other.test


def test_the_number_of_training_rows_is_limited(data):
    assert len(rows_of("gsm8k", data, 0, 7).train) == 7


def test_facts_are_scored_on_what_was_trained_in_two_parts(data):
    rows = rows_of("tofu", data, 0, 2 * AUTHOR_ROWS)
    assert len(rows.train) == 2 * AUTHOR_ROWS
    assert len(rows.validation) == AUTHOR_ROWS // 2
    assert {row.prompt for row in (*rows.validation, *rows.test)} == {row.prompt for row in rows.train}
    assert not {row.prompt for row in rows.validation} & {row.prompt for row in rows.test}


def test_facts_come_by_whole_authors(data):
    pool, _ = read("tofu", data)
    assert [{row.prompt.split()[-1] for row in author} for author in authors(pool)] == [{f"{number}?"} for number in range(6)]


def test_svamp_answers_with_a_number_as_people_write_it(data):
    assert {row.answer for row in read("svamp", data)[0]} == {str(number) for number in range(60)}


def test_an_intent_is_asked_for_and_answered_in_words(data):
    row = read("banking77", data)[0][0]
    assert row.prompt.endswith("there is 0 red")
    assert row.answer == "in red"


def test_a_classifier_gets_bare_texts_and_all_classes(data):
    rows, classes = labelled("clinc150", data, 0, 10)
    assert classes == ("black", "blue", "green", "red")
    assert len(rows.train) == 10
    assert all(row.form == "text" and not row.text.startswith("Name") and row.label in classes for row in rows.train)


def test_an_unknown_data_set_is_refused_with_the_choices(data):
    with pytest.raises(LataError, match="unknown data set 'gsm9k'; choose one of gsm8k, mbpp"):
        rows_of("gsm9k", data, 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"gsm8k cannot be read: .*train.jsonl \(No such file"):
        rows_of("gsm8k", tmp_path, 0)


def test_a_file_of_another_form_is_corrupt(tmp_path):
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp/mbpp.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(CorruptFileError, match="have another form than mbpp"):
        rows_of("mbpp", tmp_path, 0)


def test_a_data_set_with_too_few_rows_is_refused(tmp_path):
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp/mbpp.jsonl").write_text("".join(json.dumps({"text": "Add.", "code": "x"}) + "\n" for _ in range(2)))
    with pytest.raises(LataError, match="mbpp is too small: 0 rows to train on"):
        rows_of("mbpp", tmp_path, 0)
