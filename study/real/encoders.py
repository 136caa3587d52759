"""An encoder fine-tuned on two data sets of different classes, in full and in its attention projections only: disentanglement, addition and negation.

Each data set has a head of its own, which belongs to the task and is never merged.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lata_lightning.callbacks.attention_only import AttentionOnlyFinetuning
from lata_lightning.errors import LataError
from lata_lightning.evaluation.classification import Accuracy
from lata_lightning.evaluation.disentanglement import disentanglement_error
from lata_lightning.evaluation.heads import scored_with
from lata_lightning.evaluation.protocols import addition, negation, normalised_accuracy
from lata_lightning.evaluation.scales import Reweighting
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.linearity.methods import MatrixMethod
from lata_lightning.linearity.regression import regress
from lata_lightning.merging.term import Term
from lata_lightning.rows.schema import Sample
from lata_lightning.store.head_files import Head
from lata_lightning.training.classification import SequenceClassificationModule
from lata_lightning.training.loading import load_classifier
from lata_lightning.vectors.task_vector import TaskVector
from study.cells import TASK_ARITHMETIC
from study.real.data import labelled
from study.real.record import Record
from study.real.rows import summed
from study.real.tuning import MODELS, FineTunes, Run, train
from study.real.wheels import model_directory, sha256

Training = Literal["full", "attention only"]
TRAININGS: tuple[Training, ...] = ("full", "attention only")
TEXTS_PER_STEP = 32
DISENTANGLED_TEXTS = 96
"""Texts of each data set that the disentanglement error is measured on."""
MERGED: Mapping[str, MatrixMethod] = {"lata regress without samples": "regression", "TSV-M": "tsv"}
HEAD = "classifier"


def run(models: FineTunes, record: Record) -> dict[str, Any]:
    """Return accuracy, disentanglement, addition and negation of both ways of fine-tuning, as plain types for JSON.

    Args:
        models: Seed, folder and data; the encoder is that of its configuration.
        record: Of what has been computed for this seed; new values are added.
    """
    began = time.perf_counter()
    encoders = models.configuration.encoders
    names = encoders.experts
    tasks = [_Task(models, name) for name in names]
    kinds = {}
    for training in TRAININGS:
        kinds[training] = _Pair(models, record, tasks, training).measured()
        models.note(f"seed {models.seed}: encoders, {training}: {kinds[training]['single']['test']}")
    return {
        "part": "encoders",
        "seed": models.seed,
        "encoder": models.configuration.encoder,
        "tasks": {task.name: len(task.classes) for task in tasks},
        "trainings": kinds,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }


class _Task:
    """One data set with labels: its rows, its classes and its fine-tunes."""

    def __init__(self, models: FineTunes, name: str) -> None:
        self._models, self.name = models, name
        encoders = models.configuration.encoders
        self.rows, self.classes = labelled(name, models.data, models.seed, encoders.tuning.rows or 10**9)
        self.scored = {split: list(getattr(self.rows, split))[: encoders.scored] for split in ("validation", "test")}

    @cached_property
    def encoder(self) -> Path:
        """Directory of the encoder that is tuned."""
        return model_directory(self._models.configuration.encoder, self._models.work / MODELS)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the encoder."""
        return AutoTokenizer.from_pretrained(self.encoder)

    def tuned(self, training: Training) -> Run:
        """Return the fine-tune, which is run unless it is there already."""
        configuration = self._models.configuration
        encoders = configuration.encoders
        steps = encoders.tuning.steps
        rate = encoders.tuning.learning_rate if training == "full" else encoders.attention_rate
        settings = {
            "start": [sha256(path) for path in sorted(self.encoder.glob("*.safetensors"))],
            "rows": [[row.text, row.label] for row in self.rows.train],
            "training": training,
            "steps": steps,
            "rate": rate,
            "seed": self._models.seed * 1000 + 700 + encoders.experts.index(self.name),
        }

        def fit(folder: Path) -> None:
            names = dict(enumerate(self.classes))
            model = AutoModelForSequenceClassification.from_pretrained(
                self.encoder, dtype=torch.float32, id2label=names, label2id={name: number for number, name in names.items()}
            )
            module = SequenceClassificationModule(model, learning_rate=rate, weight_decay=0.01, warmup_steps=steps // 10)
            callbacks = [self._models.callback(folder, steps, None, "instruct")]
            if training == "attention only":
                callbacks.append(AttentionOnlyFinetuning(heads=[f"model.{HEAD}"]))  # type: ignore[arg-type]
            train(module, self._batches(steps, settings["seed"]), steps, callbacks, "32-true")

        return self._models.finished(f"encoder-{self.name}-{training.replace(' ', '-')}", settings, fit)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return texts as inputs of the model."""
        return dict(self.tokenizer([sample.text for sample in samples], padding=True, truncation=True, return_tensors="pt"))

    def _batches(self, steps: int, seed: int) -> list[dict[str, Tensor]]:
        draw, numbers, found = random.Random(seed), {name: number for number, name in enumerate(self.classes)}, []
        order: list[Sample] = []
        for _ in range(steps):
            while len(order) < TEXTS_PER_STEP:
                order += draw.sample(self.rows.train, len(self.rows.train))
            taken, order = order[:TEXTS_PER_STEP], order[TEXTS_PER_STEP:]
            found.append({**self.inputs(taken), "labels": torch.tensor([numbers[str(sample.label)] for sample in taken])})
        return found


class _Pair:
    """Both data sets under one way of fine-tuning."""

    def __init__(self, models: FineTunes, record: Record, tasks: Sequence[_Task], training: Training) -> None:
        self._models, self._record, self._tasks = models, record, tasks
        self._runs = [task.tuned(training) for task in tasks]
        self._digest = f"encoders {training} {' '.join(run.digest[:12] for run in self._runs)}"
        self._heads = [Head.open(run.folder) for run in self._runs]
        self._vectors = [run.vector() for run in self._runs]
        self._accuracy = {
            (task.name, split): Accuracy(task.tokenizer, scored, name=task.name) for task in tasks for split, scored in task.scored.items()
        }

    def measured(self) -> dict[str, Any]:
        """Return everything about the pair, for JSON."""
        names = [task.name for task in self._tasks]
        single = {
            split: {
                name: self._accuracies(f"single {name}", [self._vectors[number]], 1.0, split, [number])[name]
                for number, name in enumerate(names)
            }
            for split in ("validation", "test")
        }
        start = self._accuracies("start", [], 1.0, "test")
        added = addition(
            lambda scale: self._accuracies(TASK_ARITHMETIC, self._vectors, scale, "validation"),
            lambda scale: self._accuracies(TASK_ARITHMETIC, self._vectors, scale, "test"),
            single_validation=single["validation"],
            single_test=single["test"],
        )
        rows = {f"{TASK_ARITHMETIC}, best scale": {"scale": added.scale, "test": added.accuracy, "normalised": added.normalised}}
        builds: dict[str, Callable[[], TaskVector]] = {TASK_ARITHMETIC: lambda: summed(self._vectors)}
        builds |= {name: partial(merge_matrices, self._vectors, method, check_base=False) for name, method in MERGED.items()}
        builds["lata regress"] = self._regressed
        for name, build in builds.items():
            found = self._accuracies(f"{name} at 1", build, 1.0, "test")
            rows[f"{name}, scale 1"] = {"scale": 1.0, "test": found, "normalised": normalised_accuracy(found, single["test"])}
        negated = {}
        for number, name in enumerate(names):
            # Taken off the encoder that has both vectors, where the other data set is what must not suffer.
            control = 1 - number

            def scored(scale: float, split: str, number: int = number, control: int = control) -> tuple[float, float]:
                found = self._accuracies(
                    f"negation {number}", [*self._vectors], (1 - scale, 1.0) if number == 0 else (1.0, 1 - scale), split
                )
                return found[names[number]], found[names[control]]

            result = negation(lambda scale: scored(scale, "validation"), lambda scale: scored(scale, "test"))
            negated[name] = {"scale": result.scale, "target": result.target, "control": result.control}
        return {
            "start": start,
            "single": single,
            "rows": rows,
            "negation": negated,
            "disentanglement": self._record(f"{self._digest} disentanglement", self._disentanglement),
        }

    def _accuracies(
        self,
        key: str,
        vectors: Sequence[TaskVector] | Callable[[], TaskVector],
        scales: float | tuple[float, ...],
        split: str,
        tasks: Sequence[int] = (0, 1),
    ) -> dict[str, float]:
        """Return the accuracy on some tasks, each with its own head, of the encoder plus Σ scale · vector."""

        def scores() -> dict[str, float]:
            given = [vectors()] if callable(vectors) else list(vectors)
            each = [scales] * len(given) if isinstance(scales, float) else scales
            terms = [Term(vector, scale) for vector, scale in zip(given, each, strict=True) if scale]
            model, weights = self._loaded
            weights.apply(terms)
            found = {}
            for number in tasks:
                name = self._tasks[number].name
                found[name] = scored_with(self._heads[number], self._accuracy[name, split], name)(model)
            return found

        found: dict[str, float] = self._record(f"{self._digest} {key} {scales} {split} {tasks}", scores)
        return found

    def _regressed(self) -> TaskVector:
        """Return one vector of both, fitted to what each does on its own training texts."""
        count = min(self._models.configuration.encoders.samples, *(len(task.rows.train) for task in self._tasks))
        samples = [
            [task.inputs(task.rows.train[begin : min(begin + TEXTS_PER_STEP, count)]) for begin in range(0, count, TEXTS_PER_STEP)]
            for task in self._tasks
        ]
        # The vectors have the names of the classifier, whose head they lack and the regression leaves alone.
        model, weights = self._loaded
        weights.restore()
        return regress(self._vectors, model, samples, check_base=False)

    @cached_property
    def _loaded(self) -> tuple[Any, Reweighting]:
        """The encoder as a classifier, which is scored with one head at a time."""
        model = load_classifier(str(self._tasks[0].encoder), heads=self._heads).eval()
        return model, Reweighting(model)

    def _disentanglement(self) -> dict[str, Any]:
        """Return ξ on the grid, of the predictions with each task's own head and of the features."""
        grid = self._models.configuration.encoders.grid
        model, weights = self._loaded
        weights.restore()
        heads = [_linear(head) for head in self._heads]
        batches = [[(number, task.inputs(task.scored["test"][:DISENTANGLED_TEXTS]))] for number, task in enumerate(self._tasks)]

        def features(module: Any, batch: tuple[int, dict[str, Tensor]]) -> Tensor:
            output: Tensor = module.base_model(**batch[1]).pooler_output
            return output

        def predictions(module: Any, batch: tuple[int, dict[str, Tensor]]) -> Tensor:
            return torch.nn.functional.linear(features(module, batch), *heads[batch[0]])

        found: dict[str, Any] = {"scales": list(grid), "texts": DISENTANGLED_TEXTS}
        for distance, outputs in (("prediction", predictions), ("representation", features)):
            error = disentanglement_error(
                model, self._vectors, batches, scales_1=grid, scales_2=grid, distance=distance, outputs=outputs
            ).error
            inside = [index for index, scale in enumerate(grid) if 0 <= scale <= 1]
            found[distance] = {"error": error.tolist(), "mean in [0, 1]²": fmean(error[inside][:, inside].flatten().tolist())}
        return found


def _linear(head: Head) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a head that is one linear layer on the pooled output.

    Raises:
        LataError: It is something else.
    """
    names = {f"{HEAD}.weight", f"{HEAD}.bias"}
    if set(head.tensors) != names:
        raise LataError(f"the study takes encoders whose head is one linear layer, {sorted(names)}; this head has {sorted(head.tensors)}")
    return head.tensors[f"{HEAD}.weight"], head.tensors[f"{HEAD}.bias"]
