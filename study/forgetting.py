"""Forgetting: what a model keeps when an unwanted skill is taken off it, compared at equal residuals of that skill.

The target has learned the unwanted skill together with a useful one; what is taken off comes from another fine-tune, on other exercises. Where a
vector counts from base, it holds the instruction component too, which the target needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.merging.weigh import weigh
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, drop_with_threshold, linear_drop_by_rank
from study.chain import Chain, Start, skill_recipe
from study.layerwise import RULES, across_instruction, random_values, relative_norms, weighted
from study.matrices import zero_on
from study.tasks import INSTRUCT, TASKS, Split, base_perplexity

UNWANTED, USEFUL = "encode", "reverse"
SCALES = tuple(round(0.1 * 1.25**step, 4) for step in range(20))
"""From 0.1 to 6.9; a curve ends where too little of the unwanted skill is left to compare at."""
RESIDUALS = (0.5, 0.25, 0.1, 0.05)
"""Shares of the target's own score on the unwanted skill at which ways of forgetting are compared."""
RETAINED_STEPS = (25, 50, 100, 150)
RANDOM_RANKS = 5
TRIMMED = (0.2, 0.05)


@dataclass(frozen=True)
class Ancestry:
    """Where the target and the fine-tune that is taken off started from."""

    target: Start
    unwanted: Start


ANCESTRIES = {
    "known": Ancestry("instruct", "instruct"),
    "unknown": Ancestry("base", "base"),
    "mixed": Ancestry("instruct", "base"),
}
TARGET_STEPS: dict[Start, int] = {"instruct": 300, "base": 600}


@dataclass(frozen=True)
class Removal:
    """What is taken off at scale 1, and whether it is a way to be judged or a control."""

    kind: str
    delta: Mapping[str, Tensor]


def run(chain: Chain) -> dict[str, Any]:
    """Every way of forgetting of one seed, under every ancestry.

    Args:
        chain: The models of the seed; what it lacks is trained.

    Returns:
        For JSON: ``cases`` by ancestry, each with the ``target``'s own scores on validation and test, the ``alignment`` of the vector taken off, and
        ``methods``, each with its ``curve`` on validation and, ``at`` each residual, the scale chosen on validation and what is kept there on test
        (null where no scale reaches the residual).
    """
    began = time.process_time()
    return {
        "part": "forgetting",
        "seed": chain.seed,
        "unwanted": UNWANTED,
        "useful": USEFUL,
        "residuals": list(RESIDUALS),
        "cases": {name: run_case(chain, ancestry) for name, ancestry in ANCESTRIES.items()},
        "cpu_minutes": (time.process_time() - began) / 60,
    }


def run_case(chain: Chain, ancestry: Ancestry) -> dict[str, Any]:
    """Every way of forgetting under one ancestry, for JSON."""
    target = target_model(chain, ancestry.target)
    vector, alignment = unwanted_vector(chain, ancestry.unwanted)
    own = {split: scores(chain, target, split) for split in ("validation", "test")}
    methods = {}
    for name, removal in removals(chain, ancestry, vector, alignment).items():

        def taken_off(scale: float, delta: Mapping[str, Tensor] = removal.delta) -> Mapping[str, Tensor]:
            return {name: tensor - scale * delta[name] for name, tensor in target.items()}

        nothing = all(not tensor.any() for tensor in removal.delta.values())
        found = judged(chain, taken_off, () if nothing else SCALES, own)
        methods[name] = {"kind": removal.kind, "norm": norm(removal.delta), **found}
    tuned = {0.0: target, **retained_models(chain, ancestry, target)}
    methods["fine-tuning on retained data"] = {
        "kind": "baseline",
        "norm": None,
        **judged(chain, tuned.__getitem__, tuple(tuned)[1:], own, exact=True),
    }
    ranked = list(alignment.layers.values())
    return {
        "target_start": ancestry.target,
        "unwanted_start": ancestry.unwanted,
        "target": own,
        "alignment": alignment.values,
        "relative_norm": {layer: stats.relative_norm for layer, stats in alignment.layers.items()},
        "spread": alignment.spread,
        "rank_correlation": float(
            spearmanr([stats.alignment for stats in ranked], [-(stats.relative_norm or 0) for stats in ranked]).statistic
        ),
        "methods": methods,
    }


def target_model(chain: Chain, start: Start) -> dict[str, Tensor]:
    """The model that has learned both the unwanted and the useful skill."""
    own = chain.seed * 1000 + 51
    skills = {skill: TASKS[skill].rows(own) for skill in (USEFUL, UNWANTED)}
    recipe = skill_recipe(skills, chain.seed, _steps(chain, TARGET_STEPS[start]), data=chain.data, order=own)
    return chain.tuned(f"forgetting-target-from-{start}", chain.start(start), recipe)


def unwanted_vector(chain: Chain, start: Start) -> tuple[TaskVector, Alignment]:
    """The unwanted expert minus what it started from, and its alignment with the instruction vector by block."""
    expert = chain.expert(UNWANTED, start)
    alignment = align(TaskVector.between(chain.start(start), expert, start_kind=start), instruction_vector(chain), check_base=False)
    # Weighted as it is, whatever it started from: forgetting subtracts what there is.
    return TaskVector.between(chain.start(start), expert), alignment


def instruction_vector(chain: Chain) -> TaskVector:
    """Instruct minus base."""
    return TaskVector.between(chain.base(), chain.instruct(), kind="instruction")


def removals(chain: Chain, ancestry: Ancestry, vector: TaskVector, alignment: Alignment) -> dict[str, Removal]:
    """What every method takes off, by its name."""
    linear = linear_drop_by_rank(alignment)
    mean = sum(linear.values()) / len(linear)
    middle = sorted(alignment.values.values())[len(linear) // 2]
    found: dict[str, tuple[str, TaskVector]] = {
        "negation": ("baseline", vector),
        "uniformly shrunk": ("control", weighted(vector, dict.fromkeys(linear, mean), "block")),
        **{f"LATA {rule}": ("method", weighted(vector, ranked(alignment.values), "block")) for rule, ranked in RULES.items()},
        "LATA threshold": ("method", weighted(vector, drop_with_threshold(alignment, DEFAULT_THRESHOLD), "block")),
        "LATA threshold at the median": ("method", weighted(vector, drop_with_threshold(alignment, middle), "block")),
        "relative norm": ("control", weighted(vector, linear_drop_by_rank(relative_norms(alignment)), "block")),
        "reversed ranks": (
            "control",
            weighted(vector, linear_drop_by_rank({layer: -value for layer, value in alignment.values.items()}), "block"),
        ),
    }
    for number in range(1, RANDOM_RANKS + 1):
        values = random_values(list(linear), f"forgetting/{chain.seed}/{number}")
        for rule, ranked in RULES.items():
            found[f"random {rule} {number}"] = ("control", weighted(vector, ranked(values), "block"))
    deltas = {name: Removal(kind, dict(taken)) for name, (kind, taken) in found.items()}
    deltas |= {f"trimmed to {kept:.0%}": Removal("baseline", trimmed(dict(vector), kept)) for kept in TRIMMED}
    instruction = instruction_vector(chain)
    for level in ("block", "tensor"):
        across = {name: tensor.float() for name, tensor in across_instruction(vector, instruction, level).items()}
        deltas[f"across the instruction vector, by {level}"] = Removal("candidate", across)
    deltas["regression, zero on the instruction vector"] = Removal("candidate", zero_on(vector, instruction))
    if ancestry.unwanted == "base":
        complex_vector = TaskVector.between(chain.base(), chain.expert(UNWANTED, "base"), start_kind="base")
        exact = complex_vector.without(instruction)
        deltas["exact subtraction"] = Removal("candidate", dict(exact))
        deltas["exact subtraction, LATA linear"] = Removal(
            "candidate", dict(weigh(complex_vector, "linear", alignment=alignment).without(instruction).pure())
        )
    return deltas


def trimmed(vector: Mapping[str, Tensor], kept: float) -> dict[str, Tensor]:
    """The vector with all but its largest entries zero.

    Args:
        vector: Tensors by name.
        kept: Share of all entries to keep, in (0, 1]; entries that equal the smallest kept one stay, too.
    """
    sizes = torch.cat([tensor.abs().reshape(-1) for tensor in vector.values()])
    border = sizes.topk(max(1, round(kept * len(sizes)))).values[-1]
    return {name: torch.where(tensor.abs() >= border, tensor, 0) for name, tensor in vector.items()}


def retained_models(chain: Chain, ancestry: Ancestry, target: Mapping[str, Tensor]) -> dict[float, dict[str, Tensor]]:
    """The target after further steps, by their number, on the useful and the instruct skills alone."""
    own = chain.seed * 1000 + 52
    found = {}
    for steps in RETAINED_STEPS:
        recipe = skill_recipe({USEFUL: TASKS[USEFUL].rows(own)}, chain.seed, _steps(chain, steps), data=chain.data, order=own)
        found[float(steps)] = chain.tuned(f"forgetting-retained-{steps}-from-{ancestry.target}", target, recipe)
    return found


def judged(
    chain: Chain,
    at: Callable[[float], Mapping[str, Tensor]],
    scales: Sequence[float],
    own: Mapping[str, Mapping[str, float]],
    *,
    exact: bool = False,
) -> dict[str, Any]:
    """Curve on validation up to the first scale that leaves less than every residual, and what is kept on test at each of them.

    Args:
        chain: Whose models these are.
        at: The weights at a scale.
        scales: Rising.
        own: The target's scores, by split.
        exact: Only the scales given can be had, none between them.
    """
    wanted = [share * own["validation"]["unwanted"] for share in RESIDUALS]
    curve = [{"scale": 0.0, **own["validation"]}]
    for scale in scales:
        curve.append({"scale": scale, **scores(chain, at(scale), "validation")})
        if curve[-1]["unwanted"] <= min(wanted):
            break
    left = {point["scale"]: point["unwanted"] for point in curve}
    reached = {}
    for share, level in zip(RESIDUALS, wanted, strict=True):
        chosen = next((scale for scale in left if left[scale] <= level), None) if exact else crossing(left, level)
        if chosen is not None and not exact:
            # The curve is steep, and one more point where it crosses the level puts the scale right.
            left = dict(sorted({**left, chosen: residual(chain, at(chosen))}.items()))
            chosen = crossing(left, level)
        reached[f"{share:g}"] = None if chosen is None else {"scale": chosen, "test": scores(chain, at(chosen), "test")}
    return {"curve": curve, "at": reached}


def crossing(left: Mapping[float, float], level: float) -> float | None:
    """The smallest scale at which a curve, straight between its points, has fallen to a level.

    Args:
        left: Residual by rising scale.
        level: In the unit of the residuals.

    Returns:
        None if the curve never falls that far; the first scale if it begins there.
    """
    first = next(iter(left))
    if left[first] <= level:
        return first
    for before, after in pairwise(left):
        if left[after] <= level:
            return before + (after - before) * (left[before] - level) / (left[before] - left[after])
    return None


def residual(chain: Chain, weights: Mapping[str, Tensor]) -> float:
    """What is left of the unwanted skill on validation."""
    return TASKS[UNWANTED].score(chain.model(weights), "validation")


def scores(chain: Chain, weights: Mapping[str, Tensor], split: Split) -> dict[str, float]:
    """Exact match of the unwanted, the useful and the instruct skills, and perplexity of base text."""
    model = chain.model(weights)
    return {
        "unwanted": TASKS[UNWANTED].score(model, split),
        "useful": TASKS[USEFUL].score(model, split),
        "instruct": TASKS[INSTRUCT].score(model, split),
        "perplexity": base_perplexity(model, split, chain.data),
    }


def norm(vector: Mapping[str, Tensor]) -> float:
    """Euclidean length of all tensors together, to the digits that do not depend on where they lie in memory."""
    return float(f"{math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in vector.values())):.9g}")


def _steps(chain: Chain, steps: int) -> int:
    return max(1, round(steps * chain.shape.tuning))
