"""Learning one task after the other: how much of the earlier ones is kept by fine-tuning on, by replay, and by merging independent fine-tunes.

Every fine-tune of every method sees the same exercises for the same number of steps, with the same share of instruct skills and raw text; only where it
starts differs, and that replay gives half the new task's share to a memory of the earlier ones. They begin at instruct after a few exercises of every
task, so that it has a part of each: a skill that a small model has not at all appears in a fine-tune all at once, and no merge keeps any of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lata_lightning.evaluation.continual import summary
from lata_lightning.evaluation.scales import best_scale
from study.cases import CALIBRATION_ROWS, Case
from study.chain import Chain, skill_recipe
from study.layerwise import RULES
from study.rules import METHODS, RANDOM_ROWS, REGRESSION, TASK_ARITHMETIC, WITHOUT_SAMPLES, Method
from study.tasks import INSTRUCT, SEEN_EXERCISES, TASKS, SkillTask, Split
from study.training import Recipe, batches_of

Weights = Mapping[str, Tensor]

SEQUENCE = tuple(SkillTask(name, [name]) for name in ("vowels", "swap", "double", "inner", "rotate"))
START_STEPS = 150
STEPS = 80
LEARNING_RATE = 4e-4
"""Of the tasks, below the usual one of experts: further from the start no merge of these models keeps anything."""
MEMORY = 200
"""Exercises of each earlier task that replay may look at again."""
SCALES = (0.1, 0.2, 0.35, 0.6, 1.0, 1.5)
AT_ONE = f"{WITHOUT_SAMPLES}, at scale 1"
"""The merge without samples with no scale chosen."""
MERGES = (
    TASK_ARITHMETIC,
    *(f"LATA {rule}, block" for rule in RULES),
    *(f"random {rule} {number}" for rule in RULES for number in range(1, RANDOM_ROWS + 1)),
    REGRESSION,
    WITHOUT_SAMPLES,
    AT_ONE,
)


def run(chain: Chain) -> dict[str, Any]:
    """Every way of learning a sequence of one seed.

    Args:
        chain: The models of the seed; what it lacks is trained.

    Returns:
        For JSON: ``tasks`` in order, their scores under the start as ``reference``, and ``methods``, each with its ``matrix`` of accuracies on test (a
        row a stage, a column a task, later tasks included), average accuracy, backward and forward transfer and forgetting, the scores of the
        ``instruct`` skills by stage, and the ``scales`` chosen on validation of the tasks seen so far (null where there is none).
    """
    began = time.process_time()
    begun = start(chain)
    reference = _scores(chain, begun, SEQUENCE, "test")
    alone = [_tuned(chain, "alone", number, begun) for number in range(len(SEQUENCE))]
    sequential = _in_sequence(chain, "sequential")
    methods = {
        "sequential fine-tuning": _found(chain, "baseline", reference, sequential),
        "sequential fine-tuning with replay": _found(chain, "baseline", reference, _in_sequence(chain, "replay")),
        "MagMax": _merged(chain, "method", reference, lambda stage: magmax(_vectors(chain, sequential[:stage]))),
    }
    for name in MERGES:
        method, only = METHODS[WITHOUT_SAMPLES if name == AT_ONE else name], 1.0 if name == AT_ONE else None

        def delta(stage: int, method: Method = method) -> Weights:
            return method.build(_case(chain, alone[:stage]))

        methods[name] = _merged(chain, method.kind, reference, delta, only)
    return {
        "part": "continual",
        "seed": chain.seed,
        "tasks": [task.name for task in SEQUENCE],
        "reference": reference,
        "reference_instruct": TASKS[INSTRUCT].score(chain.model(begun), "test"),
        "alone": [task.score(chain.model(weights), "test") for task, weights in zip(SEQUENCE, alone, strict=True)],
        "methods": methods,
        "cpu_minutes": (time.process_time() - began) / 60,
    }


def start(chain: Chain) -> dict[str, Tensor]:
    """Instruct after a little of every task of the sequence, and instruct skills besides."""
    own = chain.seed * 1000 + 60
    seen = {task.name: task.rows(own)[:SEEN_EXERCISES] for task in SEQUENCE}
    steps = max(1, round(START_STEPS * chain.shape.tuning))
    return chain.tuned(
        "continual-start", chain.instruct(), skill_recipe(seen, chain.seed, steps, instruct_share=0.5, data=chain.data, order=own)
    )


def recipe(chain: Chain, number: int, *, replay: bool) -> Recipe:
    """How a task is learned, by its number in the sequence."""
    task, own = SEQUENCE[number], _order(chain, number)
    steps = max(1, round(STEPS * chain.shape.tuning))
    found = skill_recipe({task.name: task.rows(own)}, chain.seed, steps, learning_rate=LEARNING_RATE, data=chain.data, order=own)
    if not replay or number == 0:
        return found
    chat, *rest = found.parts
    shares = dict(chat.shares or {})
    shares[task.name] /= 2
    earlier = {each.name: each.rows(_order(chain, index))[:MEMORY] for index, each in enumerate(SEQUENCE[:number])}
    shares |= dict.fromkeys(earlier, shares[task.name] / number)
    return replace(found, parts=(replace(chat, examples={**chat.examples, **earlier}, shares=shares), *rest))


def _order(chain: Chain, number: int) -> int:
    """Seed of the exercises of a task, by its number in the sequence."""
    return chain.seed * 1000 + 61 + number


def magmax(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """Entry by entry the value of the largest magnitude, of equal ones the first; arXiv:2407.06322."""
    found = {}
    for name in vectors[0]:
        stacked = torch.stack([vector[name] for vector in vectors])
        found[name] = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    return found


def _in_sequence(chain: Chain, kind: str) -> list[dict[str, Tensor]]:
    """The models after each stage, every one tuned from the one before it."""
    models: list[dict[str, Tensor]] = []
    for number in range(len(SEQUENCE)):
        # The first stage is the same fine-tune for all.
        models.append(_tuned(chain, kind if number else "alone", number, models[-1] if models else start(chain)))
    return models


def _tuned(chain: Chain, kind: str, number: int, start: Weights) -> dict[str, Tensor]:
    key = f"continual-{kind}-{number + 1}-{SEQUENCE[number].name}"
    return chain.tuned(key, start, recipe(chain, number, replay=kind == "replay"))


def _vectors(chain: Chain, models: Sequence[Weights]) -> list[Weights]:
    begun = start(chain)
    return [{name: tensor - begun[name] for name, tensor in weights.items()} for weights in models]


def _case(chain: Chain, experts: Sequence[Weights]) -> Case:
    # Instruct in the words of methods: what the fine-tunes start from.
    instruct = start(chain)

    def not_looked_at(_: Weights) -> float:
        raise NotImplementedError("these merges look at no scores but those the scale is chosen by")

    calibration = [batches_of(task, _order(chain, number), CALIBRATION_ROWS) for number, task in enumerate(SEQUENCE[: len(experts)])]
    return Case(instruct, instruct, chain.base(), tuple(experts), chain.seed, calibration, chain.model(instruct), not_looked_at)


def _merged(
    chain: Chain, kind: str, reference: Sequence[float], delta: Callable[[int], Weights], only: float | None = None
) -> dict[str, Any]:
    """The start plus scale · delta after every stage, the scale the only one there is, or chosen anew on validation of the tasks seen so far."""
    begun = start(chain)
    models, scales = [], []
    for stage in range(1, len(SEQUENCE) + 1):
        added = delta(stage)

        def at(scale: float, added: Weights = added) -> dict[str, Tensor]:
            return {name: tensor + scale * added[name] for name, tensor in begun.items()}

        seen = SEQUENCE[:stage]
        means = {scale: sum(_scores(chain, at(scale), seen, "validation")) / stage for scale in (SCALES if only is None else ())}
        scales.append(best_scale(means) if only is None else only)
        models.append(at(scales[-1]))
    return _found(chain, kind, reference, models, scales)


def _found(
    chain: Chain, kind: str, reference: Sequence[float], models: Sequence[Weights], scales: Sequence[float] | None = None
) -> dict[str, Any]:
    matrix = [_scores(chain, weights, SEQUENCE, "test") for weights in models]
    return {
        "kind": kind,
        "matrix": matrix,
        "scales": None if scales is None else list(scales),
        **summary(matrix, reference),
        "instruct": [TASKS[INSTRUCT].score(chain.model(weights), "test") for weights in models],
    }


def _scores(chain: Chain, weights: Weights, tasks: Sequence[SkillTask], split: Split) -> list[float]:
    model = chain.model(weights)
    return [task.score(model, split) for task in tasks]
