"""The fine-tunes of a seed, each run once through LATACallback and kept as its task vector and its history."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import LataError
from lata_lightning.live.history import read_history
from lata_lightning.merging.merge import Term, merge
from lata_lightning.moments import Start
from lata_lightning.rows.schema import Sample
from lata_lightning.rows.tokens import TokenRow, collate, conversation_row, packed, text_windows
from lata_lightning.store.run_directory import HISTORY_NAME, VECTOR_NAME
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.text_data import load_training_tokenizer
from lata_lightning.vectors.task_vector import TaskVector
from study.real.configuration import Adapters, Configuration, Protocol, Tuning
from study.real.data import Rows, rows_of
from study.real.record import replace_json
from study.real.wheels import model_directory, sha256

MODELS = "models"
MEASUREMENTS = 8
"""Measurements of a fine-tune, the last one included."""
_DONE = "done.json"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One finished fine-tune.

    Attributes:
        folder: Holds the task vector and the history.
        digest: Of everything that decides what it gives, but the versions of libraries.
        seconds: Time on the wall.
    """

    folder: Path
    digest: str
    seconds: float

    @property
    def history(self) -> list[dict[str, Any]]:
        """The measurements during training, oldest first."""
        return read_history(self.folder / HISTORY_NAME)

    def vector(self, start: Start = "instruct") -> TaskVector:
        """Return the task vector without coefficients, as one that counts from ``start``."""
        vector = TaskVector.open(self.folder / VECTOR_NAME).unweighted()
        return TaskVector(vector.tensors, replace(vector.manifest, start=start, alignment=None))


class FineTunes:
    """The models and fine-tunes of one seed.

    Args:
        configuration: Says how they are made.
        work: Folder of all seeds; the models that come from wheels lie in it as well.
        seed: Of the draw and the order of rows, and of adapters. The pre-trained weights are the same for every seed.
        data: The folder that LATA_DATA names.
        note: Told one line about everything that takes long.
    """

    def __init__(self, configuration: Configuration, work: Path, seed: int, data: Path, note: Note) -> None:
        self.configuration, self.work, self.seed, self.data, self.note = configuration, work, seed, data, note
        self.folder = work / f"seed-{seed}"

    @cached_property
    def model(self) -> Path:
        """Directory of the model that everything is tuned from."""
        return model_directory(self.configuration.model, self.work / MODELS)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model."""
        return load_training_tokenizer(str(self.model))

    @cached_property
    def instruct(self) -> Path:
        """Directory of the instruct tune of the model."""
        rows = self.rows("self_instruct").train
        run = self.tuned("instruct", self.model, rows, self.configuration.instruct)
        return self.merged("instruct-model", self.model, run)

    @cached_property
    def instruction(self) -> TaskVector:
        """The instruct tune minus the model."""
        return TaskVector.between(self.model, self.instruct, kind="instruction")

    def start(self, protocol: Protocol) -> Path:
        """Return the directory that the experts of a protocol are tuned from."""
        return self.instruct if protocol == "instruct" else self.model

    def rows(self, name: str) -> Rows:
        """Return the rows of a data set for this seed, without those that are too long."""
        if name not in self._rows:
            tuning = self.configuration.experts.get(name)
            found = rows_of(name, self.data, self.seed, None if tuning is None else tuning.rows)
            self._rows[name] = Rows(*(list(filter(self.fits, part)) for part in (found.train, found.validation, found.test)))
        return self._rows[name]

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        return {}

    def fits(self, sample: Sample) -> bool:
        """Return whether a conversation is no longer than a row may be; a text is cut into windows."""
        return sample.form == "text" or len(self._row(sample)[0].input_ids) <= self.configuration.context_length

    def expert(self, name: str, protocol: Protocol, *, adapters: bool = False) -> Run:
        """Return the fine-tune on one data set; those of ``plain`` and ``base`` are the same."""
        of_instruct = protocol == "instruct"
        tuning = self.configuration.experts[name]
        key = f"{name}{'-lora' if adapters else ''}-from-{'instruct' if of_instruct else 'model'}"
        given = self.configuration.adapters if adapters else None
        return self.tuned(
            key, self.start(protocol), self.rows(name).train, tuning, given, instruction="instruct" if of_instruct else "base"
        )

    def tuned(
        self,
        key: str,
        start: Path,
        samples: Sequence[Sample],
        tuning: Tuning,
        adapters: Adapters | None = None,
        instruction: Start | None = None,
    ) -> Run:
        """Return a fine-tune, which is run unless it is there already.

        Args:
            key: Name of its folder.
            start: Directory of the model to tune.
            samples: Training rows.
            tuning: Steps and learning rate.
            adapters: For LoRA; None trains all weights.
            instruction: Whether ``start`` is the instruct tune or its base, to measure the alignment; None measures norms only.
        """
        configuration = self.configuration
        steps, rate = tuning.steps, tuning.learning_rate
        if adapters is not None:
            steps, rate = max(1, round(steps * adapters.length)), adapters.learning_rate
        seed = self.seed * 1000 + zlib.crc32(key.encode()) % 1000
        settings = {
            "start": self._digest_of(start),
            "instruction": None if instruction is None else [self._digest_of(self.model), self._digest_of(self.instruct)],
            "rows": hashlib.sha256(repr([*samples]).encode()).hexdigest(),
            "steps": steps,
            "rate": rate,
            "rank": None if adapters is None else adapters.rank,
            "seed": seed,
            "context_length": configuration.context_length,
            "tokens_per_batch": configuration.tokens_per_batch,
            "precision": configuration.precision,
        }

        def fit(folder: Path) -> None:
            rows = [row for sample in samples for row in self._row(sample)]
            lora = None if adapters is None else {"r": adapters.rank, "lora_alpha": 2 * adapters.rank, "target_modules": "all-linear"}
            module = CausalLMModule(str(start), rate, 0.0, warmup_steps=steps // 10, lora=lora)
            callback = self.callback(
                folder, steps, (str(self.model), str(self.instruct)) if instruction else None, instruction or "instruct"
            )
            train(module, self.batches(rows, steps, seed), steps, [callback], configuration.precision)

        return self.finished(key, settings, fit)

    def finished(self, key: str, settings: dict[str, Any], fit: Callable[[Path], None]) -> Run:
        """Return a run of this seed, which is made anew unless it was finished under the same settings.

        Args:
            key: Name of its folder.
            settings: Everything that decides what it gives, as plain types; ``seed`` is that of all random numbers.
            fit: Trains, and leaves a vector and a history in the folder.
        """
        folder = self.folder / "runs" / key
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        done: Any = json.loads((folder / _DONE).read_text("utf-8")) if (folder / _DONE).is_file() else {}
        if done.get("digest") != digest:
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            # Before the model is built, as adapters and heads begin at random numbers.
            seed_everything(settings["seed"], verbose=False)
            fit(folder)
            done = {"digest": digest, "seconds": round(time.perf_counter() - began, 1), "settings": settings}
            replace_json(folder / _DONE, done)
            self.note(f"seed {self.seed}: {key} trained in {done['seconds'] / 60:.1f} minutes")
        return Run(folder, digest, done["seconds"])

    def merged(self, name: str, onto: Path, run: Run) -> Path:
        """Return the directory of a model with the vector of a run added, which is written unless it is there already."""
        target = self.folder / name
        mark = self.folder / f"{name}.json"
        about = {"onto": self._digest_of(onto), "run": run.digest}
        if not (target.is_dir() and mark.is_file() and json.loads(mark.read_text("utf-8")) == about):
            shutil.rmtree(target, ignore_errors=True)
            merge(onto, [Term(run.vector())], target, check_base=False)
            replace_json(mark, about)
        return target

    def callback(self, folder: Path, steps: int, instruction: tuple[str, str] | None, start: Start) -> LATACallback:
        """Return the callback of a run: it measures now and then, and writes the plain vector at the end."""
        every = max(1, steps // MEASUREMENTS)
        return LATACallback(
            instruction, start, weighting="none", every_n_epochs=0, every_n_train_steps=every, output_dir=folder, table=False
        )

    def batches(self, rows: Sequence[TokenRow], steps: int, seed: int) -> list[dict[str, Tensor]]:
        """Return as many batches as there are steps, of rows in shuffled order, packed into rows of the context length.

        Raises:
            LataError: There are no rows.
        """
        if not rows:
            raise LataError("there are no rows to train on; are all of them longer than context_length?")
        length = self.configuration.context_length
        together = max(1, self.configuration.tokens_per_batch // length)
        full = packed(_again_and_again(rows, seed), length)
        padding = self.tokenizer.pad_token_id
        return [
            collate([next(full) for _ in range(together)], self.tokenizer.eos_token_id if padding is None else padding)
            for _ in range(steps)
        ]

    def _row(self, sample: Sample) -> list[TokenRow]:
        import torch

        if sample.form == "text":
            windows = text_windows(self.tokenizer, sample.text, self.configuration.context_length, end=True)
            return [TokenRow(row, row.clone()) for row in map(torch.tensor, windows)]
        return [conversation_row(self.tokenizer, sample, f"the row that begins {sample.prompt[:40]!r}")]

    def _digest_of(self, model: Path) -> str:
        if model not in self._digests:
            self._digests[model] = hashlib.sha256("".join(map(sha256, sorted(model.glob("*.safetensors")))).encode()).hexdigest()
        return self._digests[model]

    @cached_property
    def _digests(self) -> dict[Path, str]:
        return {}


def train(module: LightningModule, batches: Sequence[Any], steps: int, callbacks: list[Callback], precision: Any) -> None:
    """Train a module on given batches, one a step."""
    with _quiet():
        trainer = Trainer(
            devices=1,
            precision=precision,
            max_epochs=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=callbacks,
        )
        data: Any = batches
        trainer.fit(module, DataLoader(data, batch_size=None))


def _again_and_again(rows: Sequence[TokenRow], seed: int) -> Iterator[TokenRow]:
    """Yield all rows in shuffled order, again and again."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(rows, len(rows))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about loaders without workers, missing validation and where it runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
