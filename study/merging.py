"""One merging setting: every method on the whole grid of scales by validation score, then once on test at the best scale and once untuned.

The score on skills is the mean exact match over the experts' skills and the instruct skills, which count as one more. The score on text is the share of
the experts' own gain in held-out loss that is kept, averaged over the experts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.bench import machine
from lata_lightning.errors import LataError, first_three
from lata_lightning.evaluation.scales import best_scale
from lata_lightning.layers import LEVELS
from lata_lightning.vectors.manifest import library_versions
from study import tasks
from study.cases import CALIBRATION_ROWS, Case, with_adapter
from study.chain import Chain, order_of
from study.rules import TASK_ARITHMETIC, Method, methods_for
from study.settings import Setting
from study.training import Weights, batches_of

SCALES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0, 1.4, 2.0, 2.8, 4.0)
UNTUNED = 1.0
DIGITS = 6


class Scoring:
    """The score of a setting, and what it is made of.

    Args:
        setting: Of the merge.
        start: Held-out scores of what the experts were tuned from, by split and task.
        experts: Held-out scores of every expert on its own task.
    """

    def __init__(self, setting: Setting, start: Mapping[str, Mapping[str, float]], experts: Mapping[str, Mapping[str, float]]) -> None:
        self.setting, self.start, self.experts = setting, start, experts

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the tasks that the score is made of."""
        return (*self.setting.experts, *([tasks.INSTRUCT] if self.setting.track == "skills" else []))

    def details(self, model: Any, split: tasks.Split) -> dict[str, float]:
        """Score of every judged task."""
        return {name: tasks.TASKS[name].score(model, split) for name in self.judged}

    def kept(self, details: Mapping[str, float], split: tasks.Split) -> dict[str, float]:
        """Share of every expert's own gain over its start that is kept: 0 at the start, 1 at the expert."""
        start, experts = self.start[split], self.experts[split]
        return {name: (details[name] - start[name]) / (experts[name] - start[name]) for name in self.setting.experts}

    def score(self, details: Mapping[str, float], split: tasks.Split) -> float:
        """The one number that scales are chosen by; higher is better."""
        values = self.kept(details, split) if self.setting.track == "text" else details
        return sum(values.values()) / len(values)


def run(chain: Chain, setting: Setting, scales: Sequence[float] = SCALES, methods: Mapping[str, Method] | None = None) -> dict[str, Any]:
    """Everything about one setting, as plain types for JSON.

    What has been evaluated is kept beside the models, by the weights themselves; a run that was broken off goes on there, and a method that comes later or
    changes is the only one evaluated again.

    Args:
        chain: The models of the seed.
        setting: What is merged.
        scales: The grid, the same for all methods; 0 is part of it.
        methods: By name; those of ``rules`` that go with the protocol unless given.

    Raises:
        LataError: An expert is no better on its own task than what it was tuned from.
    """
    base, instruct, start = chain.base(), chain.instruct(), chain.start(setting.protocol)
    adapters = {} if setting.rank is None else {task: chain.adapter(task, setting.rank) for task in setting.experts}
    experts = {task: with_adapter(start, adapters[task]) if adapters else chain.expert(task, setting.protocol) for task in setting.experts}
    began = time.process_time()
    reference = _reference(chain, setting, {"start": start, "instruct": instruct, **experts})
    scoring = Scoring(setting, *({split: reference[of][split] for split in ("validation", "test")} for of in ("start", "own")))
    model = chain.model(instruct)
    bench = _Bench(chain, scoring, tuple(scales), chain.folder / f"merging-{setting.name}.json")

    def validation_score(weights: Weights) -> float:
        return scoring.score(scoring.details(chain.model(weights), "validation"), "validation")

    case = Case(
        start=start,
        instruct=instruct,
        base=base,
        experts=tuple(experts.values()),
        seed=chain.seed,
        calibration=[batches_of(tasks.TASKS[task], order_of(task, chain.seed), CALIBRATION_ROWS) for task in setting.experts],
        model=model,
        validation_score=validation_score,
        adapters=tuple(adapters.values()),
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, method in (methods_for(setting.protocol, chain.seed) if methods is None else methods).items():
        # What a method calls random is so by its case's seed; whatever draws from torch's own generator starts alike in every run.
        torch.manual_seed(chain.seed)
        delta = method.build(case)
        rows[name] = {"kind": method.kind, "onto": method.onto, "tuned": method.tuned, **bench.curve(method.weights(case), delta)}
    found = {
        "part": "merging",
        "seed": chain.seed,
        "setting": {"track": setting.track, "protocol": setting.protocol, "experts": list(setting.experts)}
        | ({} if setting.rank is None else {"rank": setting.rank}),
        "shape": {"blocks": chain.shape.blocks, "width": chain.shape.width, "parameters": sum(tensor.numel() for tensor in base.values())},
        "scales": list(scales),
        "reference": {"start": reference["start"]["test"], "instruct": reference["instruct"]["test"]}
        | {"experts": {task: reference[task]["test"] for task in experts}},
        "methods": rows,
        **_measured(case, setting.experts),
        "headroom": fmean(rows[TASK_ARITHMETIC]["test_kept"].values()) if TASK_ARITHMETIC in rows else None,
        "versions": library_versions(),
        "machine": machine(),
        "cpu_minutes": {
            "training": sum(chain.seconds.values()) / 60,
            "evaluation": (bench.seconds + time.process_time() - began - bench.spent) / 60,
        },
    }
    return cast("dict[str, Any]", _rounded(found))


def together(stored: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a setting with rows that were run later, on models trained again.

    Args:
        stored: The result as it is.
        added: Of the same seed and setting, with other rows.

    Raises:
        LataError: The unmerged models do not score in both what they do in the other, to the digits that are written: they are other models.
    """
    same = ("seed", "setting", "shape", "scales", "reference")
    other = [key for key in same if stored[key] != added[key]]
    if other:
        raise LataError(
            f"rows can only be added for the same models: {first_three(other)} of seed {stored['seed']} differ from what is stored. Remove the stored "
            "result and run all its rows again."
        )
    minutes = {
        "training": max(stored["cpu_minutes"]["training"], added["cpu_minutes"]["training"]),
        "evaluation": stored["cpu_minutes"]["evaluation"] + added["cpu_minutes"]["evaluation"],
    }
    headroom = stored["headroom"] if added["headroom"] is None else added["headroom"]
    return {**stored, "methods": {**stored["methods"], **added["methods"]}, "headroom": headroom, "cpu_minutes": minutes}


class _Bench:
    """Scores onto + scale · delta in place, once for the same weights.

    Args:
        chain: Its model is used.
        scoring: Of the setting.
        scales: The grid.
        memory: File of what has been evaluated.

    Attributes:
        seconds: Processor time of the evaluations that were asked for, now or in an earlier run.
        spent: Processor time of evaluations in this run.
    """

    def __init__(self, chain: Chain, scoring: Scoring, scales: tuple[float, ...], memory: Path) -> None:
        self._chain, self._scoring, self._scales, self._memory = chain, scoring, scales, memory
        self._known: dict[str, Any] = json.loads(memory.read_text("utf-8")) if memory.exists() else {}
        self._about = repr((scales, scoring.judged, scoring.start, scoring.experts, tasks.PROBLEMS, tasks.INSTRUCT_PROBLEMS, tasks.TOKENS))
        self._unmerged: dict[str, float] = {}
        self.seconds = self.spent = 0.0

    def curve(self, onto: Weights, delta: Weights) -> dict[str, Any]:
        """Validation score by scale, best scale, and test scores there and untuned."""
        started = self._digest(onto)
        key = f"{started}+{self._digest(delta)}"
        if key not in self._known:
            began = time.process_time()
            found = self._evaluated(onto, delta, started)
            taken = time.process_time() - began
            self.spent += taken
            self._known[key] = {"seconds": taken, "row": found}
            write_json(self._memory, self._known)
        self.seconds += self._known[key]["seconds"]
        return cast("dict[str, Any]", self._known[key]["row"])

    def _evaluated(self, onto: Weights, delta: Weights, started: str) -> dict[str, Any]:
        if started not in self._unmerged:
            self._unmerged[started] = self._validated(onto, delta, 0.0)
        validation = {scale: self._validated(onto, delta, scale) if scale else self._unmerged[started] for scale in self._scales}
        scale = best_scale(validation)
        tested = {each: self._tested(onto, delta, each) for each in {scale, UNTUNED}}
        return {
            "validation": {f"{each:g}": score for each, score in validation.items()},
            "scale": scale,
            "test": tested[scale]["score"],
            "test_details": tested[scale]["details"],
            "test_kept": tested[scale]["kept"],
            "untuned": tested[UNTUNED]["score"],
            "untuned_details": tested[UNTUNED]["details"],
        }

    def _validated(self, onto: Weights, delta: Weights, scale: float) -> float:
        return self._scoring.score(self._scoring.details(self._at(onto, delta, scale), "validation"), "validation")

    def _tested(self, onto: Weights, delta: Weights, scale: float) -> dict[str, Any]:
        model = self._at(onto, delta, scale)
        details = self._scoring.details(model, "test")
        others = {tasks.INSTRUCT: tasks.TASKS[tasks.INSTRUCT].score(model, "test")} if tasks.INSTRUCT not in details else {}
        others["base perplexity"] = tasks.base_perplexity(model, "test", self._chain.data)
        return {"score": self._scoring.score(details, "test"), "details": details | others, "kept": self._scoring.kept(details, "test")}

    def _at(self, onto: Weights, delta: Weights, scale: float) -> Any:
        model = self._chain.model(onto)
        if scale:
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                torch._foreach_add_(list(parameters.values()), [delta[name].float() for name in parameters], alpha=scale)
        return model

    def _digest(self, weights: Weights) -> str:
        found = hashlib.sha256(self._about.encode())
        for name in sorted(weights):
            found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
        return found.hexdigest()[:32]


def write_json(path: Path, record: Any) -> None:
    """Write a file under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)


def _reference(chain: Chain, setting: Setting, models: Mapping[str, Weights]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of unmerged models on all tasks of the setting, instruct skills and base text; under ``own`` those of every expert on its own task."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, weights in models.items():
        model = chain.model(weights)
        found[name] = {
            split: {task: tasks.TASKS[task].score(model, split) for task in (*setting.experts, tasks.INSTRUCT)}
            for split in cast("tuple[tasks.Split, ...]", ("validation", "test"))
        }
        found[name]["test"]["base perplexity"] = tasks.base_perplexity(model, "test", chain.data)
    found["own"] = {split: {task: found[task][split][task] for task in setting.experts} for split in ("validation", "test")}
    sign = -1 if setting.track == "text" else 1
    gains = [
        (task, sign * (found["own"][split][task] - found["start"][split][task]))
        for split in ("validation", "test")
        for task in setting.experts
    ]
    useless = sorted({task for task, gain in gains if gain <= 0})
    if useless:
        raise LataError(f"every expert must be better on its own task than its start, and {', '.join(useless)} is not: train it longer")
    return found


def _measured(case: Case, names: Sequence[str]) -> dict[str, Any]:
    """What the vectors look like: alignment, relative norm and spread, by expert in the order of the setting, and cosines between vectors."""
    levels = {level: case.alignments(level) for level in LEVELS}
    flat = {name: _flat(vector) for name, vector in zip(names, case.vectors, strict=True)}
    anchored = {name: _flat(vector) for name, vector in zip(names, case.anchored, strict=True)}
    start = _flat(case.start)
    blocks = levels["block"]
    return {
        "alignment": {layer: [found.values.get(layer) for found in blocks] for layer in blocks[0].layers},
        "relative_norm": {layer: [found.layers[layer].relative_norm for found in blocks] for layer in blocks[0].layers},
        "spread": {level: [found.spread for found in measured] for level, measured in levels.items()},
        "norm": {name: float(vector.norm() / start.norm()) for name, vector in flat.items()},
        "cosine": {f"{one}, {other}": _cosine(flat[one], flat[other]) for one, other in combinations(names, 2)},
        "cosine_anchored": {f"{one}, {other}": _cosine(anchored[one], anchored[other]) for one, other in combinations(names, 2)},
    }


def _flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
