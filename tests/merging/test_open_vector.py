import pytest
from tiny_models import same_bits, weights, write_model

from lata_lightning.errors import SourceError
from lata_lightning.merging.open_vector import open_vector
from lata_lightning.vectors.task_vector import TaskVector


@pytest.fixture
def models(tmp_path):
    write_model(tmp_path / "start", weights(0))
    write_model(tmp_path / "tuned", weights(1))
    TaskVector.between(tmp_path / "start", tmp_path / "tuned", start_kind="base").save(tmp_path / "vector")
    return tmp_path


def test_a_saved_vector_is_opened_and_a_tuned_model_is_compared(models):
    saved, tuned = open_vector(str(models / "vector"), models / "start")
    difference, model = open_vector(str(models / "tuned"), models / "start")
    assert (tuned, model) == (None, str(models / "tuned"))
    assert same_bits(dict(saved), dict(difference))
    assert (saved.start, difference.start) == ("base", "instruct")


@pytest.mark.parametrize("vocabulary", [None, "onto", "union"])
@pytest.mark.parametrize("path", ["vector", "tuned"])
def test_the_start_that_is_given_goes_before_what_is_recorded(models, path, vocabulary):
    for start in ("base", "instruct"):
        assert open_vector(str(models / path), models / "start", start=start, vocabulary=vocabulary)[0].start == start


def test_a_start_that_is_given_asks_for_no_coefficients(models):
    assert open_vector(str(models / "vector"), models / "start", start="instruct")[0].manifest.asked_for is False


def test_what_is_neither_vector_nor_model_is_refused(models):
    with pytest.raises(SourceError, match="nowhere does not exist"):
        open_vector(str(models / "nowhere"), models / "start")
