"""Variants of the merge without samples, and of that with samples, compared on development seeds; the one that is chosen is confirmed on the others.

The rule was written down before any of them was run. Of each of the two kinds the variant is chosen whose score on validation at scale 1 has the highest
mean over the settings that can tell methods apart and over the development seeds. What the package does already stays unless another variant is better
by at least half a point: a smaller difference is within the noise of two seeds, and it would change what users get for nothing.

On seeds 100 and 101 the rule chose, without samples, what the package does (ridge 1, the sum as prior, every matrix, the mean of biases and norms), and
with samples the sum as prior and ridge 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.numerics.matrix_regression import Settings
from lata_lightning.vectors.task_vector import TaskVector
from study import merging
from study.cases import Case, Weights, summed
from study.chain import Chain
from study.methods import regressed
from study.rules import METHODS, REGRESSION, TASK_ARITHMETIC, TOWARDS_SUM, WITHOUT_SAMPLES, Method
from study.settings import Setting, settings

LEAST_GAIN = 0.5
"""Points by which a variant must be better than what the package does."""
SCALES = (0.0, 1.0)
LEFT_OUT = ("text-base-wikitext2+gsm8k+mbpp",)
"""Settings where task arithmetic keeps too little to tell methods apart."""
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def run(chain: Chain) -> dict[str, Any]:
    """Scores at scale 1 of every variant of one seed, as plain types for JSON: by setting, then by variant, on validation and on test."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    minutes = 0.0
    for setting in compared_settings():
        result = merging.run(chain, setting, SCALES, VARIANTS)
        minutes += result["cpu_minutes"]["evaluation"]
        found[setting.name] = {
            name: {"validation": row["validation"]["1"], "test": row["untuned"]} for name, row in result["methods"].items()
        }
    return {"part": "variants", "seed": chain.seed, "settings": found, "cpu_minutes": minutes}


def compared_settings() -> list[Setting]:
    """The settings that count in the choice."""
    return [setting for setting in settings() if setting.name not in LEFT_OUT]


def without_samples(case: Case, **options: Any) -> Weights:
    """The merge without samples under other settings."""
    return summed([merge_matrices(case.vectors, settings=Settings(**options), check_base=False)])


def some_plain(case: Case, chosen: Callable[[TaskVector, str], bool], mean: bool) -> Weights:
    """The merge without samples, but some tensors get the mean of the vectors or their sum."""
    share = 1 / len(case.vectors) if mean else 1.0
    plain = {name: share * tensor for name, tensor in summed(case.vectors).items()}
    return {name: plain[name] if chosen(case.vectors[0], name) else tensor for name, tensor in METHODS[WITHOUT_SAMPLES].build(case).items()}


def is_embedding_or_head(vector: TaskVector, name: str) -> bool:
    """Whether a tensor is a matrix outside the blocks."""
    return len(vector.shape(name)) == 2 and name in vector.layers.outside()


def has_one_axis(vector: TaskVector, name: str) -> bool:
    """Whether a tensor is a bias or a norm."""
    return len(vector.shape(name)) == 1


def joined(case: Case) -> Weights:
    """The merge without samples where q, k and v of a block are one matrix, and gate and up another, as in checkpoints that store them fused."""
    merged = merge_matrices([TaskVector.between(_joined(case.start), _joined(expert)) for expert in case.experts], check_base=False)
    found: dict[str, Tensor] = {}
    for name, tensor in merged.items():
        names = _siblings(name)
        found |= dict(zip(names, torch.split(tensor, [len(case.start[each]) for each in names]), strict=True))
    return found


def of_same_norm(case: Case) -> Weights:
    """The merge without samples, every matrix scaled to the norm that the sum of the vectors has."""
    plain = summed(case.vectors)
    found = dict(METHODS[WITHOUT_SAMPLES].build(case))
    for name, tensor in found.items():
        if tensor.ndim == 2 and tensor.any():
            found[name] = tensor * (plain[name].norm() / tensor.norm())
    return found


def _siblings(name: str) -> list[str]:
    """Names of the matrices that are joined under this one, which is the first of them; the name alone where there are none."""
    for first, *others in _TOGETHER:
        if f".{first}." in name:
            return [name, *(name.replace(f".{first}.", f".{other}.") for other in others)]
    return [name]


def _joined(weights: Weights) -> dict[str, Tensor]:
    covered = {other for name in weights for other in _siblings(name)[1:]}
    return {name: torch.cat([weights[each] for each in _siblings(name)]) for name in weights if name not in covered}


def _listed() -> list[Method]:
    alone, from_samples = (partial(Method, kind="candidate", onto=onto) for onto in ("start", "instruct"))
    return [
        METHODS[TASK_ARITHMETIC],
        METHODS["TSV-M"],
        METHODS[WITHOUT_SAMPLES],
        *(alone(f"ridge {ridge:g}", build=partial(without_samples, ridge=ridge)) for ridge in (0.3, 3.0)),
        alone("prior mean", build=partial(without_samples, prior="mean")),
        alone("embeddings and head: mean", build=partial(some_plain, chosen=is_embedding_or_head, mean=True)),
        alone("embeddings and head: sum", build=partial(some_plain, chosen=is_embedding_or_head, mean=False)),
        alone("biases and norms: sum", build=partial(some_plain, chosen=has_one_axis, mean=False)),
        alone("q, k, v and gate, up joined", build=joined),
        alone("norm of the sum", build=of_same_norm),
        METHODS[REGRESSION],
        from_samples(f"{REGRESSION} --prior sum", build=partial(regressed, prior="sum")),
        from_samples(f"{REGRESSION} --prior sum --ridge 0.1", build=partial(regressed, prior="sum", ridge=0.1)),
        METHODS[TOWARDS_SUM],
    ]


VARIANTS: dict[str, Method] = {method.name: method for method in _listed()}
