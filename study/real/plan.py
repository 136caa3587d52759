"""What a run takes, part by part, reckoned from the configuration before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import NamedTuple

from study.real.configuration import Configuration, Protocol
from study.real.continual import MERGES
from study.real.data import AUTHOR_ROWS
from study.real.encoders import TEXTS_PER_STEP, TRAININGS
from study.real.forgetting import HALVINGS, STARTS, WRONG
from study.real.rows import rows_for

_FACT_TOKENS = 80
"""Of a fact with its question and the chat format, about."""
_SETTING_ROWS = 8
"""Removals of one case of forgetting besides random ranks, about."""
_BYTES = 4
_MAPPED = 15
"""Copies of the weights that are resident at most, as it was seen: in training, weights, gradients, two moments and what is mapped of files."""


class Cost(NamedTuple):
    """What one part of one seed takes.

    Attributes:
        training, scoring: Minutes.
        vectors: Bytes of the vectors that stay.
    """

    training: float
    scoring: float
    vectors: int


def costs(configuration: Configuration) -> dict[str, Cost]:
    """Return the cost of every part of one seed; models that several parts need count with the first of them, in the order of the parts.

    Adapters take little disk, and so do histories and results.
    """
    return {
        "merging": _merging(configuration),
        "prediction": _prediction(configuration),
        "forgetting": _forgetting(configuration),
        "continual": _continual(configuration),
        "encoders": _encoders(configuration),
    }


def plan(configuration: Configuration, seeds: int) -> str:
    """Return the costs as lines of text.

    Args:
        configuration: Of the run.
        seeds: How many are run.
    """
    found = costs(configuration)
    model = _BYTES * configuration.speed.parameters
    lines = [f"{'part':<12}{'training':>12}{'scoring':>12}{'vectors':>12}   for each seed, on two idle cores"]
    lines += [f"{part:<12}{cost.training:>8.0f} min{cost.scoring:>8.0f} min{cost.vectors / 1e9:>9.1f} GB" for part, cost in found.items()]
    minutes = sum(cost.training + cost.scoring for cost in found.values())
    vectors = sum(cost.vectors for cost in found.values())
    # The instruct tune stays; one row, and at most two models between the stages of a sequence, come and go.
    return "\n".join(
        [
            *lines,
            f"in all      {minutes / 60:.1f} hours for one seed, {seeds * minutes / 60:.1f} hours for {seeds}; what is interrupted goes on where "
            "it stopped",
            f"disk        {(seeds * (vectors + 2 * model) + 4 * model) / 1e9:.0f} GB for {seeds}; the folder seed-N may be removed once its "
            "results are written",
            f"memory      about {_MAPPED * model / 1e9:.0f} GB at most, files that are mapped included",
            "",
        ]
    )


def _merging(configuration: Configuration) -> Cost:
    speed, held_out = configuration.speed, configuration.held_out
    kinds = {(_start(setting.protocol), setting.adapters, name) for setting in configuration.settings for name in setting.experts}
    steps = _steps(
        configuration, {name: sum(name == each for _, adapters, each in kinds if not adapters) for name in configuration.experts}
    )
    adapted = configuration.adapters.length * _steps(
        configuration, {name: sum(name == each for _, adapters, each in kinds if adapters) for name in configuration.experts}
    )
    full = sum(not adapters for _, adapters, _ in kinds)
    training = (steps + configuration.instruct.steps) * configuration.tokens_per_batch / speed.full
    training += adapted * configuration.tokens_per_batch / speed.adapters
    tokens = 0
    for setting in configuration.settings:
        count, rows = len(setting.experts), rows_for(setting.protocol).values()
        curve = count * held_out["validation"] * len(configuration.scales)
        test = (count + 2) * held_out["test"]
        tokens += len(rows) * (curve + 2 * test) + (count + 1) * test
        tokens += sum(row.tuned for row in rows) * configuration.few_shot_trials * count * held_out["validation"]
    return Cost(training / 60, tokens / speed.scoring / 60, (full + 1) * _BYTES * speed.parameters)


def _prediction(configuration: Configuration) -> Cost:
    pairs = 2 * comb(len(configuration.pairs), 2)
    held_out = configuration.held_out
    tokens = pairs * 2 * ((len(configuration.scales) + 1) * held_out["validation"] + 3 * held_out["test"])
    return Cost(0.0, tokens / configuration.speed.scoring / 60, 0)


def _forgetting(configuration: Configuration) -> Cost:
    forgetting, speed = configuration.forgetting, configuration.speed
    forgotten, retained = (AUTHOR_ROWS * count for count in (forgetting.forgotten, forgetting.retained))
    share = forgotten / (forgotten + retained)
    # Target; retrained, and the target trained on; and what is taken off, twice.
    steps = forgetting.tuning.steps * (1 + 2 * (1 - share) + 2 * share)
    removals = len(STARTS) * (_SETTING_ROWS + forgetting.random_rows) + 3
    tried = (len(forgetting.scales) + HALVINGS) * forgotten * _FACT_TOKENS
    measured = (forgotten + retained) * (2 + WRONG) * _FACT_TOKENS + 2 * configuration.held_out["test"]
    generated = (forgotten + retained) * forgetting.answer_tokens
    scoring = removals * ((tried + measured) / speed.scoring + generated / speed.generating)
    return Cost(steps * configuration.tokens_per_batch / speed.full / 60, scoring / 60, 6 * _BYTES * speed.parameters)


def _continual(configuration: Configuration) -> Cost:
    speed, sequence, held_out = configuration.speed, configuration.continual, configuration.held_out
    count = len(sequence.experts)
    steps = 2 * sum(configuration.experts[name].steps for name in sequence.experts[1:])
    seen = count * (count + 1) / 2
    test = count * (count + 1) * held_out["test"]
    tokens = (len(MERGES) + 1) * (len(sequence.scales) * seen * held_out["validation"] + test) + 2 * test
    return Cost(
        steps * configuration.tokens_per_batch / speed.full / 60, tokens / speed.scoring / 60, 2 * (count - 1) * _BYTES * speed.parameters
    )


def _encoders(configuration: Configuration) -> Cost:
    encoders, speed = configuration.encoders, configuration.speed
    runs = 2 * len(TRAININGS)
    training = runs * encoders.tuning.steps * TEXTS_PER_STEP / speed.encoder
    # Scoring texts takes about a third of training on them: 21 scales of addition and of negation of either, and the disentanglement error.
    texts = len(TRAININGS) * (3 * 21 * 2 * encoders.scored + 2 * len(encoders.grid) ** 2 * 192)
    return Cost(training / 60, texts / (3 * speed.encoder) / 60, runs * _BYTES * speed.encoder_parameters)


def _start(protocol: Protocol) -> str:
    return "instruct" if protocol == "instruct" else "model"


def _steps(configuration: Configuration, times: Mapping[str, int]) -> int:
    return sum(configuration.experts[name].steps * count for name, count in times.items())
