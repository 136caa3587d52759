"""The whole job on the shipped checkpoints: fine-tune, measure, export, merge, forget, score."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.display.layer_tables import alignment_table
from lata_lightning.display.tables import show
from lata_lightning.errors import OutputError
from lata_lightning.evaluation.scales import Reweighting, best_scale, scale_for_residual
from lata_lightning.linearity.regression import regress
from lata_lightning.merging.merge import Term, forget, merge
from lata_lightning.quickstart.experts import BASE, EXPERTS, INSTRUCT, fine_tune, training_samples
from lata_lightning.quickstart.methods import LATA_METHODS, REGRESSION, TREATMENTS, WITHOUT_SAMPLES
from lata_lightning.quickstart.results import Results, ScoreRow
from lata_lightning.quickstart.scoring import Scoring, mean
from lata_lightning.store.output_policy import end_dry_run, set_aside
from lata_lightning.store.run_directory import VECTOR_NAME
from lata_lightning.training.interrupting import interruptible
from lata_lightning.training.loading import load_causal_lm
from lata_lightning.vectors.task_vector import TaskVector

MARKER = ".lata-quickstart"
MERGE_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0)
FORGET_SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
MERGED_SKILLS = ("math", "string")
JUDGED = ("math", "string", "instruct")
SAMPLES = 32
"""Number of training exercises of each expert that regression may use as samples."""
RESIDUAL = 0.1
"""Remaining share of unwanted answers at which methods of forgetting are compared."""


def run(output: str | Path, *, experts: Mapping[str, Any] = EXPERTS, tables: bool = True) -> Results:
    """Do the whole job and print the results.

    Everything is seeded and single-threaded, so every run gives the same tables. An interrupted run continues after its last finished fine-tune; for a
    finished run the tables are printed again.

    Args:
        output: Directory for vectors, models and tables: a new one, or that of an earlier quickstart.
        experts: Settings of the fine-tunes.
        tables: Print the tables on standard output.

    Returns:
        The scores in the tables.

    Raises:
        OutputError: The directory exists and does not belong to a quickstart, or the disk is full.
    """
    directory = Path(output)
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).is_file():
        raise OutputError(f"{directory} exists already and is not the output of a quickstart. Choose another --output, or remove it first.")
    end_dry_run(directory)
    with set_aside(directory):
        results = _results(directory, experts)
    if tables:
        _show(directory, results)
    return results


def _results(directory: Path, experts: Mapping[str, Any]) -> Results:
    finished = Results.load(directory)
    if finished is not None:
        sys.stderr.write("These are the results of an earlier run; --overwrite runs it again.\n")
        return finished
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    threads = torch.get_num_threads()
    # Such small models gain nothing from a second thread, and are much slower with one if another process uses the core.
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), _Quiet(), _progress() as progress:
            warnings.simplefilter("ignore")
            results = _Job(directory, progress, experts).run()
    finally:
        torch.set_num_threads(threads)
    results.save(directory)
    return results


class _Job:
    """The stages in order, sharing directory and progress display."""

    def __init__(self, directory: Path, progress: Progress, experts: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self._directory, self._progress, self._experts = directory, progress, experts
        self._instruction = directory / "vectors" / "instruction"
        for name, shipped in {"base": BASE, "instruct": INSTRUCT}.items():
            self._copy(shipped, self._model(name))
        self._tokenizer = AutoTokenizer.from_pretrained(INSTRUCT)
        self._validation, self._test = Scoring(self._tokenizer, "validation"), Scoring(self._tokenizer, "test")

    def run(self) -> Results:
        self._write_data()
        if not self._instruction.exists():
            TaskVector.between(self._model("base"), self._model("instruct"), kind="instruction").save(self._instruction)
        vectors = {name: self._fine_tune(name) for name in self._experts}
        models = [self._score("instruct", self._model("instruct"))]
        models += [self._score(f"{name} expert", self._model(name)) for name in self._experts if name != "target"]
        merges = self._merges([vectors[name] for name in MERGED_SKILLS])
        forgetting = self._forgetting(vectors["unwanted"])
        self._write_models(vectors, merges, forgetting)
        return Results(models, merges, forgetting, RESIDUAL)

    def _fine_tune(self, name: str) -> TaskVector:
        """Train one expert with the callback, unless an earlier run has done so; return its task vector."""
        run_directory, model = self._directory / "runs" / name, self._model(name)
        if not model.exists():
            # An interrupted fine-tune cannot be used; the directory is our own.
            shutil.rmtree(run_directory, ignore_errors=True)
            pl.seed_everything(self._experts[name].seed, workers=True, verbose=False)
            module, data, options = fine_tune(name, self._model("instruct"), dict(self._experts))
            callback = LATACallback(str(self._instruction), output_dir=run_directory, table=False)
            bar = _Bar(self._progress, f"fine-tune {name}")
            trainer = pl.Trainer(**{**options, "default_root_dir": self._directory}, callbacks=[callback, bar])
            with interruptible("the same command goes on after the last finished fine-tune"):
                trainer.fit(module, datamodule=data)
            self._copy(INSTRUCT, model, module.model)
        return TaskVector.open(run_directory / VECTOR_NAME)

    def _score(self, name: str, model: Path) -> ScoreRow:
        return ScoreRow(name, self._test(load_causal_lm(str(model))))

    def _merges(self, vectors: Sequence[TaskVector]) -> list[ScoreRow]:
        """Score instruct itself, then each merging method at its best scale on validation."""
        model = load_causal_lm(str(self._model("instruct")))
        weights = Reweighting(model)
        nothing = mean(self._validation(model, JUDGED), JUDGED)
        rows = [ScoreRow("instruct, nothing merged", self._test(model), 0.0)]
        samples = [training_samples(name, self._tokenizer, SAMPLES, self._experts) for name in MERGED_SKILLS]
        merges = {name: [method(vector) for vector in vectors] for name, method in TREATMENTS.items()}
        merges[WITHOUT_SAMPLES] = [regress(vectors)]
        merges[REGRESSION] = [regress(vectors, str(self._model("instruct")), samples)]
        bar = self._progress.add_task("merge at each scale", total=len(merges) * len(MERGE_SCALES))
        for name, weighted in merges.items():
            curve = {0.0: nothing}
            for scale in MERGE_SCALES:
                weights.apply([Term(vector, scale) for vector in weighted])
                curve[scale] = mean(self._validation(model, JUDGED), JUDGED)
                self._progress.advance(bar)
            scale = best_scale(curve)
            weights.apply([Term(vector, scale) for vector in weighted])
            rows.append(ScoreRow(name, self._test(model), scale, _json_keys(curve)))
        return rows

    def _forgetting(self, vector: TaskVector) -> list[ScoreRow]:
        """Score the target itself, then each method at the scale that leaves ``RESIDUAL`` of the unwanted skill on validation."""
        model = load_causal_lm(str(self._model("target")))
        weights = Reweighting(model)
        rows = [ScoreRow("target, nothing forgotten", self._test(model), 0.0)]
        bar = self._progress.add_task("forget to one residual", total=len(TREATMENTS))
        for name, method in TREATMENTS.items():
            weighted = method(vector)

            def residual_at(scale: float, weighted: TaskVector = weighted) -> float:
                weights.apply([Term(weighted, -scale)])
                return self._validation(model, ["unwanted"])["unwanted"]

            scale, tried = scale_for_residual(residual_at, FORGET_SCALES, RESIDUAL)
            if scale is not None:
                weights.apply([Term(weighted, -scale)])
            rows.append(ScoreRow(name, None if scale is None else self._test(model), scale, _json_keys(tried)))
            self._progress.advance(bar)
        return rows

    def _write_models(self, vectors: Mapping[str, TaskVector], merges: Sequence[ScoreRow], forgetting: Sequence[ScoreRow]) -> None:
        """Write two models: the LATA merge that is best on validation, and the target after forgetting by the paper's rule for it."""
        models = self._directory / "models"
        best = max((row for row in merges if row.name in LATA_METHODS), key=lambda row: max((row.curve or {}).values()))
        method = TREATMENTS[best.name]
        terms = [Term(method(vectors[name]), best.scale or 0.0) for name in MERGED_SKILLS]
        shutil.rmtree(models / "merged", ignore_errors=True)
        merge(self._model("instruct"), terms, models / "merged", command="lata quickstart")
        # By threshold; if every layer is aligned too well for that, nothing would be subtracted, so the next rule that reached the residual is taken.
        reached = {row.name: row.scale for row in forgetting if row.scores is not None}
        name = next((name for name in reversed(LATA_METHODS) if name in reached), None)
        if name is not None:
            shutil.rmtree(models / "forgotten", ignore_errors=True)
            term = Term(TREATMENTS[name](vectors["unwanted"]), reached[name] or 0.0)
            forget(self._model("target"), term, models / "forgotten", command="lata quickstart")

    def _write_data(self) -> None:
        """Write the validation problems as JSONL, one file for each group of skills, for commands that need samples."""
        data = self._directory / "data"
        data.mkdir(exist_ok=True)
        for group, problems in self._validation.exercises.items():
            (data / f"{group}.jsonl").write_text("".join(json.dumps(exercise._asdict()) + "\n" for exercise in problems), "utf-8")

    def _copy(self, shipped: Path, target: Path, tuned: Any = None) -> None:
        """Copy a shipped model directory atomically, with the weights of ``tuned`` if given."""
        if target.exists():
            return
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if tuned is None:
            shutil.copytree(shipped, partial)
        else:
            shutil.copytree(shipped, partial, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
            tuned.save_pretrained(partial)
        partial.rename(target)

    def _model(self, name: str) -> Path:
        models = self._directory / "models"
        models.mkdir(exist_ok=True)
        return models / name


class _Bar(pl.Callback):
    """Progress of one fine-tune in optimizer steps."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the progress bar."""
        self._task = self._progress.add_task(self._title, total=trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Update the progress bar."""
        self._progress.update(self._task, completed=trainer.global_step)


class _Quiet:
    """Silences the notices of Lightning and transformers, so that only progress bars and tables are printed."""

    def __enter__(self) -> None:
        import logging

        from transformers.utils import logging as transformers_logging

        self._loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as transformers_logging

        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(self._verbosity)
        transformers_logging.enable_progress_bar()


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _json_keys(curve: Mapping[float, float]) -> dict[str, float]:
    return {f"{scale:g}": value for scale, value in sorted(curve.items())}


def _show(directory: Path, results: Results) -> None:
    for name in EXPERTS:
        manifest = TaskVector.open(directory / "runs" / name / VECTOR_NAME).manifest
        if manifest.alignment is not None:
            show(
                alignment_table(
                    manifest.alignment, f"{name}: alignment by block with the instruction vector, coefficients by the linear rule"
                )
            )
    show(*results.tables())
    sys.stdout.write(
        f"Written to {directory}: task vectors in runs/*/{VECTOR_NAME}, the measurements of every epoch in runs/*/history.jsonl, models in models/, "
        "validation problems in data/.\n"
        f"Look closer: lata inspect {directory}/runs/math/{VECTOR_NAME} · lata align {directory}/runs/math/{VECTOR_NAME} --instruction "
        f"{directory}/vectors/instruction\n"
    )
