"""Learning tasks in sequence: one fine-tune and one task vector for each task, and one model after each."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import CorruptFileError, LataError, OutputError, differing, first_three
from lata_lightning.evaluation.continual import summary
from lata_lightning.layers import Level
from lata_lightning.linearity.methods import Method
from lata_lightning.merging.merge import Term, merge
from lata_lightning.merging.methods import check_method
from lata_lightning.merging.weigh import weigh
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.store.writer import write_json
from lata_lightning.training.interrupting import interruptible
from lata_lightning.training.loading import load_causal_lm
from lata_lightning.vectors.task_vector import TaskVector
from lata_lightning.weighting import DEFAULT_THRESHOLD, Weighting

SequenceRule = Literal["sequential", "merge"]
ACCURACIES_NAME = "accuracies.json"
MODEL_NAME = "model"
RUN_FOLDER = "run"
_PARTIAL = ".partial"
_CHECKPOINT = "latest"
_SAFE_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: Letters, digits, ``_``, ``.`` and ``-``; its directory is named after it.
        prepare: Takes the directory of a model and returns module, data and options for ``Trainer(**options).fit(module, datamodule=data)``, which
            trains that model on this task.
        score: Returns the score of a model on held-out data of this task; higher is better.
        seed: Random seed, set before the fine-tune.
    """

    name: str
    prepare: Callable[[Path], tuple[pl.LightningModule, Any, Mapping[str, Any]]]
    score: Callable[[Any], float]
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """Scores and final model of a sequence of tasks.

    Attributes:
        tasks: Names in order.
        reference: Score of the start on each task.
        accuracies: One row for each stage, with the score on every task, later tasks included.
        model: Directory of the model after the last stage.
    """

    tasks: tuple[str, ...]
    reference: Sequence[float]
    accuracies: Sequence[Sequence[float]]
    model: Path

    @property
    def summary(self) -> dict[str, float | None]:
        """Average accuracy, backward and forward transfer, and forgetting; None where one has no value."""
        return summary(self.accuracies, self.reference)


def learn_in_sequence(
    start: str | Path,
    tasks: Sequence[Task],
    output: str | Path,
    *,
    rule: SequenceRule = "merge",
    weighting: Weighting = "none",
    scale: float = 1.0,
    method: Method = "sum",
    instruction_vector: str | Path | TaskVector | None = None,
    level: Level = "block",
    threshold: float = DEFAULT_THRESHOLD,
    outside: float = 0.0,
    keep_checkpoints: bool = False,
) -> Learned:
    """Learn tasks one after the other, and record the accuracy matrix.

    Under the rule ``merge`` each task is learned from the start, and the model after stage k is start + Σ scale · coefficient · vector over the first k
    tasks: task arithmetic with the weighting ``none``, LATA with another one. Under ``sequential``, which is ordinary fine-tuning, each task is learned
    from the model after the previous one, and its task vector is relative to that model.

    Finished stages are in ``output/01-name``, ``02-name``, …, each with ``run`` (task vector and history) and ``model``. To continue an interrupted
    sequence, call this again with the same arguments: finished stages are not trained again; the interrupted one starts anew, or from its last checkpoint
    with ``keep_checkpoints``. ``output/accuracies.json`` is written after each stage.

    Runs in one process only.

    Args:
        start: Model directory or hub id.
        tasks: The tasks in the order of learning, with different names.
        output: A new directory, or that of the same sequence.
        rule: ``merge`` or ``sequential``.
        weighting: Weighting rule under ``merge``; all but ``none`` need an instruction vector.
        scale: Multiplier of every vector under ``merge``.
        method: How vectors are combined under ``merge``: ``sum``, or ``regression``, ``tsv`` or ``iso``, which take them unweighted (see
            ``lata_lightning.merging.merge.merge``).
        instruction_vector: A saved instruction vector whose instruct model is ``start``, to measure alignment with under ``merge``.
        level: Unit of weighting.
        threshold: Used by the weighting ``threshold``.
        outside: Coefficient of the tensors outside all layers.
        keep_checkpoints: Write a checkpoint at the end of each epoch; it is removed when the stage is finished.

    Returns:
        The accuracy matrix and the last model.

    Raises:
        LataError: A name or setting is invalid, a score is not finite, or a trainer has several processes.
        OutputError: The directory belongs to another sequence or to something else, or an earlier stage is missing.
        CorruptFileError: The accuracy matrix cannot be read.

    Source: Sequence and matrix as in Lopez-Paz and Ranzato, arXiv:1706.08840; merged task vectors, arXiv:2212.04089 and 2502.20186.
    """
    _check(tasks, rule, weighting, scale, method, instruction_vector)
    directory, names = Path(output), tuple(task.name for task in tasks)
    settings = {
        "start": str(start), "tasks": list(names), "rule": rule, "weighting": weighting, "scale": scale, "level": level,
        "threshold": threshold, "outside": outside, **({} if method == "sum" else {"method": method}),
    }  # fmt: skip
    record = _Record.open(directory, settings)
    if not record.reference:
        record.reference = _scores(tasks, start)
        record.save()
    model, terms = Path(start), list[Term]()
    stages = [directory / f"{number:02d}-{name}" for number, name in enumerate(names, start=1)]
    _check_prefix(stages)

    def learned(stage: Path) -> TaskVector:
        # The callback has stored the coefficients of the weighting rule.
        vector = TaskVector.open(stage / RUN_FOLDER / VECTOR_NAME)
        return weigh(vector, "none" if weighting == "none" else "stored")

    for number, (task, stage) in enumerate(zip(tasks, stages, strict=True), start=1):
        origin = Path(start) if rule == "merge" else model
        if not stage.exists():
            del record.accuracies[number - 1 :]
            partial = directory / f".{stage.name}{_PARTIAL}"
            instruction = instruction_vector if rule == "merge" else None
            callback = LATACallback(
                instruction, weighting=weighting if instruction else "none", level=level, output_dir=partial / RUN_FOLDER, threshold=threshold,
                outside=outside, table=False,
            )  # fmt: skip
            _train(task, origin, partial, callback, keep_checkpoints)
            new = Term(learned(partial), scale if rule == "merge" else 1.0)
            shutil.rmtree(partial / MODEL_NAME, ignore_errors=True)
            merge(origin, [*terms, new], partial / MODEL_NAME, method=method)
            shutil.rmtree(partial / _CHECKPOINT, ignore_errors=True)
            partial.rename(stage)
        if rule == "merge":
            terms.append(Term(learned(stage), scale))
        model = stage / MODEL_NAME
        if len(record.accuracies) < number:
            record.accuracies.append(_scores(tasks, model))
            record.save()
    return Learned(names, record.reference, record.accuracies, model)


class _Record:
    """The file with the settings and the accuracy matrix of a sequence."""

    def __init__(self, path: Path, settings: Mapping[str, Any], reference: list[float], accuracies: list[list[float]]) -> None:
        self._path, self._settings, self.reference, self.accuracies = path, settings, reference, accuracies

    @classmethod
    def open(cls, directory: Path, settings: Mapping[str, Any]) -> _Record:
        """Open the record of an earlier call with the same settings, or create a new one."""
        path = directory / ACCURACIES_NAME
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            directory.mkdir(parents=True, exist_ok=True)
            record = cls(path, settings, [], [])
            record.save()
            return record
        if not path.is_file():
            raise OutputError(f"{directory} exists already and is not the output of a sequence. Choose another output, or remove it first.")
        try:
            data = json.loads(path.read_text("utf-8"))
            known, reference, accuracies = data["settings"], list(data["reference"]), [list(row) for row in data["accuracies"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} holds no accuracy matrix ({error!r})") from error
        other = [f"{name}: {known.get(name)!r} there, {value!r} here" for name, value in settings.items() if known.get(name) != value]
        if other:
            raise OutputError(f"{directory} holds another sequence; {differing(other, len(settings), 'settings')}. Choose another output.")
        return cls(path, settings, reference, accuracies)

    def save(self) -> None:
        """Replace the file atomically."""
        data = {
            "settings": dict(self._settings),
            "reference": self.reference,
            "accuracies": self.accuracies,
            "stages": [summary(self.accuracies[: stage + 1], self.reference) for stage in range(len(self.accuracies))],
        }
        partial = self._path.with_name(f".{self._path.name}{_PARTIAL}")
        write_json(partial, data)
        partial.replace(self._path)


def _check(tasks: Sequence[Task], rule: str, weighting: Weighting, scale: float, method: Method, instruction_vector: object) -> None:
    names = [task.name for task in tasks]
    wrong = {name for name in names if names.count(name) > 1 or not _SAFE_NAME.fullmatch(name)}
    if not names or wrong:
        raise LataError(
            f"tasks need different names of letters, digits, '_', '.' and '-'; of {len(names)} names others are {first_three(wrong)}"
        )
    if rule not in get_args(SequenceRule):
        raise LataError(f"unknown rule {rule!r}; choose one of {', '.join(get_args(SequenceRule))}")
    check_method(method, "cpu")
    if method != "sum" and (rule == "sequential" or weighting != "none"):
        raise LataError(
            f"the method {method!r} makes one vector of all, taken whole, so it needs the rule 'merge' and the weighting 'none'; got the rule {rule!r} "
            f"and the weighting {weighting!r}"
        )
    if rule == "sequential" and (weighting != "none" or scale != 1.0):
        raise LataError(f"under the rule 'sequential' nothing is weighted or scaled, got weighting {weighting!r} and scale {scale}")
    if weighting != "none" and instruction_vector is None:
        raise LataError(f"the weighting {weighting!r} needs an instruction vector to measure the alignment with")


def _check_prefix(stages: Sequence[Path]) -> None:
    done = [stage.name for stage in stages if stage.exists()]
    missing = [stage.name for stage in stages[: len(done)] if not stage.exists()]
    if missing:
        raise OutputError(f"{stages[0].parent} lacks {first_three(missing)} before later stages. Put it back, or remove the later ones.")


def _train(task: Task, origin: Path, partial: Path, callback: LATACallback, keep_checkpoints: bool) -> None:
    """Run one fine-tune, in the directory of an unfinished stage."""
    run, checkpoints = partial / RUN_FOLDER, partial / _CHECKPOINT
    if (run / VECTOR_NAME).exists():
        # The vector is written atomically at the end of training.
        return
    checkpoint = next(checkpoints.glob("*.ckpt"), None) if keep_checkpoints else None
    if checkpoint is None:
        # Without a checkpoint, the rest of an interrupted fine-tune cannot be used.
        shutil.rmtree(partial, ignore_errors=True)
    pl.seed_everything(task.seed, workers=True, verbose=False)
    module, data, options = task.prepare(origin)
    callbacks = [*options.get("callbacks", ()), callback]
    if keep_checkpoints:
        callbacks.append(ModelCheckpoint(checkpoints, filename=_CHECKPOINT, enable_version_counter=False))
    trainer = pl.Trainer(**{"default_root_dir": partial, **options, "callbacks": callbacks, "enable_checkpointing": keep_checkpoints})
    if trainer.world_size > 1:
        raise LataError(f"a sequence runs in one process, and the trainer of {task.name} has {trainer.world_size}; set devices=1")
    with interruptible():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


def _scores(tasks: Sequence[Task], model: str | Path) -> list[float]:
    loaded = load_causal_lm(str(model))
    scores = [float(task.score(loaded)) for task in tasks]
    strange = [task.name for task, score in zip(tasks, scores, strict=True) if not math.isfinite(score)]
    if strange:
        raise LataError(f"scores must be finite numbers; under {model} they are not for {first_three(strange)}")
    return scores
