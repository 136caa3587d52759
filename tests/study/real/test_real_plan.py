"""What the plan reckons, by hand on a configuration with round numbers."""

from dataclasses import replace

import pytest

from study.real.configuration import Sequence, Setting, Speed, Tuning, read_configuration
from study.real.plan import costs
from study.real.rows import rows_for


@pytest.fixture
def configuration():
    speed = Speed(full=100, adapters=200, scoring=1000, generating=10, encoder=32, parameters=1000, encoder_parameters=100)
    return replace(
        read_configuration("smollm2_135m"),
        tokens_per_batch=100,
        instruct=Tuning(60, 1e-3),
        experts={name: Tuning(60, 1e-3) for name in ("gsm8k", "mbpp", "tofu")},
        held_out={"validation": 1000, "test": 2000},
        scales=(0.5, 1.0),
        few_shot_trials=10,
        settings=(Setting("plain", ("gsm8k", "mbpp")),),
        pairs=("gsm8k", "mbpp", "tofu"),
        continual=Sequence(("gsm8k", "mbpp"), (1.0,), 1),
        speed=speed,
    )


def test_experts_of_several_settings_are_trained_once(configuration):
    one = costs(configuration)["merging"]
    # The instruct tune and two experts, a second for each step.
    assert one.training == pytest.approx(3.0)
    assert one.vectors == 3 * 4 * 1000
    settings = (*configuration.settings, Setting("base", ("gsm8k", "mbpp")))
    assert costs(replace(configuration, settings=settings))["merging"].training == pytest.approx(3.0)
    settings = (*settings, Setting("instruct", ("gsm8k", "mbpp")), Setting("plain", ("gsm8k", "mbpp"), adapters=True))
    # Two more in full, and two adapters at twice the speed.
    assert costs(replace(configuration, settings=settings))["merging"].training == pytest.approx(6.0)


def test_every_row_is_scored_at_every_scale_and_twice_on_test(configuration):
    rows = len(rows_for("plain"))
    tokens = rows * (2 * 1000 * 2 + 2 * 4 * 2000) + 3 * 4 * 2000 + 10 * 2 * 1000
    assert costs(configuration)["merging"].scoring == pytest.approx(tokens / 1000 / 60)


def test_pairs_are_merged_in_full_and_as_adapters(configuration):
    # Three pairs of two data sets: three models on validation and three on test.
    assert costs(configuration)["prediction"].scoring == pytest.approx(2 * 3 * 2 * (3 * 1000 + 3 * 2000) / 1000 / 60)


def test_encoders_take_as_long_as_their_texts(configuration):
    # Four runs of 32 texts a step, and as many texts a second.
    steps = configuration.encoders.tuning.steps
    assert costs(configuration)["encoders"].training == pytest.approx(4 * steps / 60)
