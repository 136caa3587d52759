"""Configuration files: the ready one, what takes the place of its models, and what is refused."""

import re

import pytest
import yaml

from lata_lightning.errors import LataError, SourceError
from study.real.configuration import Setting, read_configuration
from study.real.ready import READY, gives_checkpoints


@pytest.fixture
def written(tmp_path):
    """Function that writes the ready configuration with some keys changed, and returns its path."""

    def write(**changes):
        content = yaml.safe_load(READY["smollm2_135m"].read_text()) | changes
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


def test_the_ready_configuration_has_six_experts_in_pairs_triples_and_all_together():
    configuration = read_configuration("smollm2_135m")
    assert len(configuration.experts) >= 6
    full = {len(setting.experts) for setting in configuration.settings if setting.protocol == "plain" and not setting.adapters}
    assert full == {2, 3, 6}
    assert {(setting.protocol, setting.adapters) for setting in configuration.settings} == {
        ("plain", False),
        ("plain", True),
        ("instruct", False),
        ("base", False),
    }


def test_another_model_takes_the_place_of_that_of_the_file():
    configuration = read_configuration("smollm2_135m", model="org/model", encoder="folder")
    assert (configuration.model, configuration.encoder) == ("org/model", "folder")


def test_a_file_is_read_like_a_ready_one(written):
    configuration = read_configuration(written(scales=[0.5]))
    assert configuration.name == "own"
    assert configuration.scales == (0.5,)


def test_a_setting_is_named_after_what_is_merged():
    assert Setting("plain", ("a", "b"), adapters=True).name == "plain-lora-a+b"
    assert Setting("base", ("a", "b")).name == "base-a+b"


def test_scores_stay_known_under_another_grid_and_not_under_another_precision(written):
    identity = read_configuration("smollm2_135m").identity()
    assert read_configuration(written(scales=[0.5])).identity() == identity
    assert read_configuration(written(precision="32-true")).identity() != identity


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scales": [0.0, 1.0]}, "must give scales above 0"),
        ({"colour": "red"}, "unknown are 1: ['colour']"),
        ({"threads": None}, "some are missing"),
        ({"instruct": 3}, "instruct must hold keys and values, it holds a int"),
        ({"adapters": {"rank": 2, "size": 3}}, "adapters takes the keys learning_rate, length, rank; unknown are 1: ['size']"),
        ({"experts": []}, "must give experts by name, and a list of settings"),
        ({"pairs": ["gsm9k"]}, "names data sets that are unknown, 1: ['gsm9k']"),
        ({"pairs": ["svamp"]}, "says under experts how each is tuned; it does not for 1: ['svamp']"),
        ({"held_out": {"test": 5}}, "must give held_out for validation and test, it gives test"),
        ({"settings": [{"protocol": "raw", "experts": ["gsm8k", "mbpp"]}]}, "one of the protocols plain, instruct, base"),
        ({"settings": [{"protocol": "plain", "experts": ["gsm8k"]}]}, "at least two experts"),
    ],
)
def test_a_wrong_key_is_named(written, changes, said):
    with pytest.raises(LataError, match=re.escape(said)):
        read_configuration(written(**changes))


def test_a_missing_file_is_refused_with_the_ready_ones(tmp_path):
    with pytest.raises(
        SourceError, match=r"none.yaml is no configuration file .* and none of the ready ones: gemma2_9b, llama3_8b, smollm2_135m"
    ):
        read_configuration(tmp_path / "none.yaml")


@pytest.mark.parametrize(("content", "said"), [("- a", "holds a list"), ("a: [", "is no YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, said):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(LataError, match=said):
        read_configuration(path)


@pytest.mark.parametrize(("name", "given"), [("smollm2_135m", False), ("llama3_8b", True), ("gemma2_9b", True)])
def test_the_published_configurations_give_their_checkpoints(name, given):
    assert gives_checkpoints(name) is given
