"""Forgetting facts about authors: every way of taking them off is stopped where it remembers no more than a model that never learned them.

The target is the instruct tune after facts about some authors to be forgotten and others to be kept. The retrained model has learned those to be
kept only. What is taken off comes from another fine-tune on the facts to be forgotten, from the instruct tune (known start) or from the model it
was made from (start at base). Wrong answers, which the truth ratio needs, are those to the question of the same number about other authors.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lata_lightning.alignment import Alignment
from lata_lightning.evaluation.answers import Answers
from lata_lightning.evaluation.scales import scale_for_residual
from lata_lightning.evaluation.unlearning import UnlearningEvaluation
from lata_lightning.moments import Start
from lata_lightning.rows.schema import Sample
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.projection import project
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import Weighting
from study.layerwise import RULES, random_values
from study.real.data import authors, read
from study.real.merging import Benches, built
from study.real.record import Record
from study.real.scoring import INSTRUCTIONS, TEXT, Bench, HeldOut, autocast
from study.real.tuning import FineTunes, Run

WRONG = 3
"""Wrong answers of each fact."""
HALVINGS = 3
STARTS: dict[str, Start] = {"known start": "instruct", "start at base": "base"}


def run(models: FineTunes, held_out: HeldOut, record: Record, benches: Benches) -> dict[str, Any]:
    """Return every way of forgetting, for both starts of the vector that is taken off, as plain types for JSON.

    Args:
        models: The fine-tunes of the seed; what is missing is trained.
        held_out: Scores models.
        record: Of what has been computed for this seed; new values are added.
        benches: Models in memory.
    """
    began = time.perf_counter()
    facts = Facts(models)
    forgetting = models.configuration.forgetting
    tuning, instruct = forgetting.tuning, models.instruct
    both = [*facts.forgotten, *facts.retained]

    def tuned(key: str, start: Path, samples: Sequence[Sample], instruction: Start) -> Run:
        # As many passes over the rows as the target makes.
        steps = max(1, round(tuning.steps * len(samples) / len(both)))
        return models.tuned(f"facts-{key}", start, samples, replace(tuning, steps=steps), instruction=instruction)

    target = tuned("target", instruct, both, "instruct")
    retrained = tuned("retrained", instruct, facts.retained, "instruct")
    onto = models.merged("facts-target-model", instruct, target)
    retained_only = tuned("target-retained", onto, facts.retained, "instruct")
    judge = _Judge(models, held_out, record, facts, benches, target, retrained)
    reference = judge.measured("retrained", benches(instruct), retrained.vector(), 1.0)
    found: dict[str, Any] = {
        "target": judge.measured("target", benches(onto), None, 0.0),
        "retrained": reference,
        "fine-tuning on retained facts": judge.measured("retained only", benches(onto), retained_only.vector(), 1.0),
    }
    cases = {}
    for case, start in STARTS.items():
        unwanted = tuned(f"unwanted-from-{start}", instruct if start == "instruct" else models.model, facts.forgotten, start)
        alignment = align(unwanted.vector(start), models.instruction, check_base=False)
        methods = {}
        for name, (kind, build) in removals(unwanted, start, alignment, models).items():
            with built(models.folder / "scratch", build, models.seed) as vector:
                methods[name] = {
                    "kind": kind,
                    **judge.forgotten(f"{case} {unwanted.digest[:8]} {name}", onto, vector, reference["probability"]),
                }
            scale = methods[name]["scale"]
            models.note(
                f"seed {models.seed}: forgetting, {case}: {name} {'never forgets enough' if scale is None else f'at scale {scale:.3g}'}"
            )
        cases[case] = {"alignment": alignment.values, "spread": alignment.spread, "methods": methods}
    return {
        "part": "forgetting",
        "seed": models.seed,
        "model": models.configuration.model,
        "references": found,
        "cases": cases,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


class Facts:
    """The facts of one seed: about authors to be forgotten and about others, with wrong answers in files for the measures of unlearning.

    Args:
        models: Whose seed and folder these are.
    """

    def __init__(self, models: FineTunes) -> None:
        forgetting = models.configuration.forgetting
        pool, _ = read("tofu", models.data)
        drawn = random.Random(f"facts/{models.seed}").sample(authors(pool), forgetting.forgotten + forgetting.retained)
        self.by_author = [[fact for fact in author if models.fits(fact)] for author in drawn]
        self.forgotten = [fact for author in self.by_author[: forgetting.forgotten] for fact in author]
        self.retained = [fact for author in self.by_author[forgetting.forgotten :] for fact in author]
        self.files = {name: models.folder / f"facts-{name}.jsonl" for name in ("forgotten", "retained")}
        models.folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("forgotten", drawn[: forgetting.forgotten]), ("retained", drawn[forgetting.forgotten :])):
            rows = [
                {
                    "question": fact.prompt,
                    "answer": fact.answer,
                    "perturbed_answer": [other[number].answer for other in drawn if other is not author][:WRONG],
                }
                for author in part
                for number, fact in enumerate(author)
                if models.fits(fact)
            ]
            self.files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def removals(unwanted: Run, start: Start, alignment: Alignment, models: FineTunes) -> dict[str, tuple[str, Any]]:
    """Return by name what every method takes off at scale 1, as a function, with whether it is a method, a baseline, a candidate or a control."""
    # Weighted as it is, whatever it started from: forgetting subtracts what there is.
    vector, from_start = unwanted.vector(), unwanted.vector(start)
    ranked = replace(alignment, start="instruct")
    layers = list(alignment.layers)
    mean = fmean(RULES["linear"](alignment.values).values())
    rules: tuple[Weighting, ...] = ("linear", "log", "threshold")

    def weighted(table: Mapping[str, float]) -> TaskVector:
        return vector.with_coefficients(table).pure()

    def ruled(rule: Weighting) -> TaskVector:
        return vector.weighted(ranked, rule).pure()

    found: dict[str, tuple[str, Any]] = {
        "negation": ("baseline", lambda: vector),
        "uniformly shrunk": ("control", lambda: weighted(dict.fromkeys(layers, mean))),
        **{f"LATA {rule}": ("method", partial(ruled, rule)) for rule in rules},
        "reversed ranks": ("control", lambda: weighted(RULES["linear"]({layer: -value for layer, value in alignment.values.items()}))),
        "lata project": ("candidate", lambda: project(from_start, models.instruction, check_base=False)),
    }
    for number in range(1, models.configuration.forgetting.random_rows + 1):
        table = RULES["linear"](random_values(layers, f"forgetting/{models.seed}/{number}"))
        found[f"random linear {number}"] = ("control", partial(weighted, table))
    if start == "base":
        found["exact subtraction"] = ("candidate", lambda: from_start.without(models.instruction))
    return found


class _Judge:
    """Finds the scale of a removal, and measures what is left and what is kept there."""

    def __init__(
        self, models: FineTunes, held_out: HeldOut, record: Record, facts: Facts, benches: Benches, target: Run, retrained: Run
    ) -> None:
        self._models, self._held_out, self._record, self._benches, self._retrained = models, held_out, record, benches, retrained
        self._digest = f"{target.digest[:8]}{retrained.digest[:8]}"
        self._answers = Answers(models.tokenizer, facts.forgotten)
        self._kept = Answers(models.tokenizer, facts.retained)
        self._measures = UnlearningEvaluation(
            models.tokenizer, facts.files["forgotten"], {"retain": facts.files["retained"]}, models.configuration.forgetting.answer_tokens
        )

    def forgotten(self, key: str, onto: Path, vector: Any, wanted: float) -> dict[str, Any]:
        """Return scale and measures of a removal at the smallest scale at which no more is remembered than is wanted; None if there is none."""
        bench = self._benches(onto)

        def left(scale: float) -> float:
            value: float = self._record(
                f"{self._digest} {key} left {scale:g}", lambda: self._probability(bench.plus(vector(), -scale), self._answers)
            )
            return value

        found = scale_for_residual(left, self._models.configuration.forgetting.scales, wanted, HALVINGS)
        measured = None if found.scale is None else self.measured(key, bench, vector, -found.scale)
        return {"scale": found.scale, "left": {f"{scale:g}": value for scale, value in sorted(found.tried.items())}, "measured": measured}

    def measured(self, key: str, bench: Bench, vector: Any, scale: float) -> dict[str, Any]:
        """Return the measures of a model plus scale · vector."""

        def measures() -> dict[str, Any]:
            reference = self._reference()
            model = bench.at([]) if vector is None else bench.plus(vector if isinstance(vector, TaskVector) else vector(), scale)
            with autocast(self._models.configuration.precision):
                result = self._measures(model, reference)
            return {
                "probability": self._probability(model, self._answers),
                "kept": self._probability(model, self._kept),
                "instruct": self._held_out(model, INSTRUCTIONS, "test").loss,
                "text": self._held_out(model, TEXT, "test").loss,
                **result.summary,
            }

        found: dict[str, Any] = self._record(f"{self._digest} {key} measured {scale:g}", measures)
        return found

    def _reference(self) -> list[float] | None:
        """Return the truth ratios of the retrained model."""

        def ratios() -> list[float] | None:
            model = self._benches(self._models.instruct).plus(self._retrained.vector(), 1.0)
            with autocast(self._models.configuration.precision):
                return self._measures.truth_ratios(model)

        known: list[float] | None = self._record(f"{self._digest} truth ratios of the retrained model", ratios)
        return known

    def _probability(self, model: Any, answers: Answers) -> float:
        """Return the mean probability of the answers, each the geometric mean over its tokens."""
        with autocast(self._models.configuration.precision):
            return fmean(score.probability for score in answers.scores(model))
