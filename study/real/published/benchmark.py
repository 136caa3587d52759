"""Runs a configuration: every method at every scale is merged from disk, scored and removed again; what is known is written after every model."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lata_lightning.alignment import alignment_of
from lata_lightning.errors import CorruptFileError, OutputError, SourceError, differing, first_line
from lata_lightning.layers import LEVELS
from lata_lightning.merging.merge import Term, merge
from lata_lightning.merging.vocabularies import between_vocabularies, resized
from lata_lightning.moments import Moments, Start
from lata_lightning.store.directories import find_directory
from lata_lightning.store.opening import open_source
from lata_lightning.store.writer import PARTIAL_MARK
from lata_lightning.vectors.aligning import measure
from lata_lightning.vectors.manifest import Kind, library_versions
from lata_lightning.vectors.task_vector import TaskVector
from study.real.published.configuration import Configuration
from study.real.published.scoring import HeldOut, Losses, digest, gains, kept, open_model, release, score_tasks
from study.real.published.streamed import STREAMED, Measured
from study.real.record import replace_json
from study.rules import METHODS

RESULTS, MOMENTS, MERGED = "results.json", "moments.json", "merged"
UNTUNED = 1.0
Note = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        device: Where models are scored; by default a GPU if there is one.
        keep: Leave the merged models in the folder ``merged``.
        limit: Examples of each task of the harness; all by default.
        run_code: Let tasks run code that models write.
        seed: Of random ranks.
    """

    device: str | None = None
    keep: bool = False
    limit: int | None = None
    run_code: bool = False
    seed: int = 0


class Benchmark:
    """One configuration in one folder, which may hold a part of its results already.

    Args:
        configuration: What to compare.
        texts: Folder of held-out texts, see ``HeldOut``.
        folder: For results and merged models.
        options: How to run.
        note: Told one line about everything worth knowing.

    Raises:
        SourceError: A model cannot be had, or a text is missing.
        OutputError: The folder holds results of something else.
        LataError: The texts cannot be used.
    """

    def __init__(self, configuration: Configuration, texts: Path, folder: Path, options: Options, note: Note) -> None:
        self.configuration, self.folder, self.options, self.note = configuration, folder, options, note
        # All of them before any work, as a gated one is best known at once.
        self.paths = {name: find_directory(model) for name, model in configuration.models.items()}
        self.tokenizer = _tokenizer(self.paths["instruct"][0])
        self.held_out = HeldOut(self.tokenizer, texts, configuration.domains, configuration.context_length)
        self.results = self._resumed()

    def run(self) -> dict[str, Any]:
        """The results; everything that was there already is left as it is."""
        self._remove_partial()
        self._score_references()
        self._say_what_is_learned()
        self._describe()
        for name in self.configuration.methods:
            self._run_method(name)
        merged = self.folder / MERGED
        if merged.is_dir() and not any(merged.iterdir()):
            merged.rmdir()
        return self.results

    def onto(self, method: str) -> str:
        """Name of the model that a method adds to."""
        return self.configuration.start if METHODS[method].onto == "start" else "instruct"

    def terms(self, method: str, scale: float) -> list[Term]:
        """What a method adds: one term for each expert; nothing is read but for the alignments, if they are not known yet."""
        streamed = STREAMED[method]
        terms = []
        for number, expert in enumerate(self.configuration.experts):
            tuned = str(self.paths[expert][0])
            if not streamed.anchored:
                terms.append(Term(self._between(self.configuration.start, expert), scale, tuned))
                continue
            vector = self._between("instruct", expert)
            if streamed.weight is not None:
                alignment = alignment_of(self._moments[expert], vector.layers, streamed.level)
                vector = streamed.weight(Measured(vector, alignment, number, self.options.seed))
            terms.append(Term(vector, scale, tuned))
        return terms

    # Models as they are.

    def _score_references(self) -> None:
        reference: dict[str, Any] = self.results["reference"]
        skipped: dict[str, str] = {}
        # Instruct first: what cannot be run on it is not tried on the others.
        for name in ("instruct", *(other for other in self.configuration.models if other != "instruct")):
            row = reference.setdefault(name, {"tasks": {}})
            tasks = [task for task in self.configuration.tasks if task not in row["tasks"] and task not in skipped]
            if "test" in row and not tasks:
                continue
            model = open_model(str(self.paths[name][0]), self.configuration.dtype, self.options.device)
            row |= {split: self.held_out(model, split) for split in ("validation", "test") if split not in row}
            scores, failed = self._tasks(model, tasks)
            row["tasks"] |= scores
            skipped |= failed
            release(model)
            for task, reason in failed.items():
                self.note(f"{task} is passed over: {reason}")
            self.results["skipped_tasks"] = skipped
            self._save(f"{name} scored")

    def _say_what_is_learned(self) -> None:
        for split in ("validation", "test"):
            found = gains(self._losses(split), self.configuration)
            self.results["gains"][split] = found
            for name, gain in found.items():
                if gain is None or gain <= 0:
                    domain = self.configuration.experts[name].domain
                    self.note(
                        f"{name} predicts {domain} ({split}) no better than instruct does, so there is no gain to keep; it is left out of the mean"
                    )
        self._save(None)

    # Merges.

    def _run_method(self, name: str) -> None:
        row = self.results["methods"].setdefault(
            name, {"kind": METHODS[name].kind, "onto": self.onto(name), "validation": {}, "validation_losses": {}, "chosen": {}}
        )
        at_zero = self._losses("validation")[row["onto"]]
        row["validation_losses"]["0.0"] = dict(at_zero)
        for scale in self.configuration.scales:
            if repr(scale) in row["validation_losses"]:
                continue
            row["validation_losses"][repr(scale)] = self._scored(name, scale, lambda model: self.held_out(model, "validation"))
            self._save(f"{name}, scale {scale:g}")
        row["validation"] = {
            scale: kept(losses, self._losses("validation"), self.configuration) if losses else None
            for scale, losses in sorted(row["validation_losses"].items(), key=lambda entry: float(entry[0]))
        }
        grid = {repr(scale) for scale in (0.0, *self.configuration.scales)}
        usable = {float(scale): score for scale, score in row["validation"].items() if score is not None and scale in grid}
        # Of equal scores the smaller scale, as it moves the model less.
        row["scale"] = max(usable, key=lambda scale: (usable[scale], -scale)) if usable else None
        for scale in dict.fromkeys([UNTUNED, *([] if row["scale"] is None else [row["scale"]])]):
            self._judge(name, row, scale)
        row["untuned"] = row["chosen"][repr(UNTUNED)]["kept"]
        row["test"] = None if row["scale"] is None else row["chosen"][repr(row["scale"])]["kept"]
        self._save(None)

    def _judge(self, name: str, row: dict[str, Any], scale: float) -> None:
        """Score a method at one scale on test texts and tasks."""
        if scale == 0:
            found = self.results["reference"][row["onto"]]
            judged = {"test": found["test"], "tasks": found["tasks"]}
        else:
            judged = row["chosen"].get(repr(scale), {"tasks": {}})
            tasks = [task for task in self.configuration.tasks if task not in judged["tasks"] and task not in self.results["skipped_tasks"]]
            if "test" in judged and not tasks:
                return

            def score(model: Any) -> dict[str, Any]:
                scores, failed = self._tasks(model, tasks)
                for task, reason in failed.items():
                    self.note(f"{task} failed on {name} at scale {scale:g}: {reason}")
                return {"test": judged.get("test") or self.held_out(model, "test"), "tasks": {**judged["tasks"], **scores}}

            judged = self._scored(name, scale, score) or {"test": {}, "tasks": {}}
        losses = judged["test"]
        row["chosen"][repr(scale)] = {**judged, "kept": kept(losses, self._losses("test"), self.configuration) if losses else None}
        self._save(f"{name}, scale {scale:g} on test")

    def _scored(self, name: str, scale: float, score: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What a score says of a merged model, which is removed afterwards; nothing if its weights are no finite numbers."""
        path = self.folder / MERGED / f"{name.replace(' ', '-').replace(',', '')}-{scale!r}"
        try:
            if not path.exists():
                merge(
                    str(self.paths[self.onto(name)][0]),
                    self.terms(name, scale),
                    path,
                    dtype=self.configuration.dtype,
                    vocabulary=self.configuration.vocabulary,
                    command=f"study real {self.configuration.name}: {name}, scale {scale:g}",
                )
            model = open_model(str(path), self.configuration.dtype, self.options.device)
            found = score(model)
            release(model)
        except CorruptFileError as error:
            self.note(f"{name} at scale {scale:g} has no score: {first_line(error)}")
            found = {}
        if not self.options.keep:
            shutil.rmtree(path, ignore_errors=True)
        return found

    # Vectors.

    def _between(self, start: Start, tuned: str, kind: Kind = "task") -> TaskVector:
        """Tuned − start. Expert − instruct is the task vector wherever the fine-tune began: complex vector less instruction vector is the same."""
        sides = str(self.paths[start][0]), str(self.paths[tuned][0])
        if self.configuration.vocabulary is None:
            return TaskVector.between(*sides, kind=kind, start_kind=start)
        return between_vocabularies(*sides, "start", kind=kind, start_kind=start)[0]

    @cached_property
    def _moments(self) -> dict[str, dict[str, Moments]]:
        """The three sums of every tensor by expert, which all alignments follow from; measured once and kept in a file."""
        file = self.folder / MOMENTS
        if file.is_file():
            stored = json.loads(file.read_text("utf-8"))
            return {expert: {name: Moments(*sums) for name, sums in table.items()} for expert, table in stored.items()}
        found: dict[str, dict[str, Moments]] = {}
        for expert in self.configuration.experts:
            vector, instruction = self._between("instruct", expert), self._between("base", "instruct", "instruction")
            if self.configuration.vocabulary is not None:
                instruction = resized(instruction, vector, open_source(str(self.paths["instruct"][0])).config)
            found[expert] = measure(vector, instruction)
            self.note(f"alignment of {expert} measured")
        replace_json(file, {expert: {name: astuple(sums) for name, sums in table.items()} for expert, table in found.items()})
        return found

    def _describe(self) -> None:
        """Write alignments and relative norms by block to the results."""
        for expert, table in self._moments.items():
            layers = self._between("instruct", expert).layers
            by_level = {level: alignment_of(table, layers, level) for level in LEVELS}
            blocks = by_level["block"]
            self.results["alignment"][expert] = {
                "blocks": {layer: stats.alignment for layer, stats in blocks.layers.items()},
                "relative_norm": {layer: stats.relative_norm for layer, stats in blocks.layers.items()},
                "spread": {level: found.spread for level, found in by_level.items()},
            }

    # Results.

    def _tasks(self, model: Any, tasks: list[str]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        return score_tasks(model, self.tokenizer, tasks, self.configuration, limit=self.options.limit, run_code=self.options.run_code)

    def _losses(self, split: str) -> dict[str, Losses]:
        return {name: row[split] for name, row in self.results["reference"].items()}

    def _identity(self) -> dict[str, Any]:
        return {
            "configuration": self.configuration.identity(),
            "limit": self.options.limit,
            "seed": self.options.seed,
            "models": {name: revision or _files(path) for name, (path, revision) in self.paths.items()},
            "texts": {split: {domain: digest(path) for domain, path in files.items()} for split, files in self.held_out.files.items()},
        }

    def _resumed(self) -> dict[str, Any]:
        file, identity = self.folder / RESULTS, json.loads(json.dumps(self._identity()))
        if not file.is_file():
            others = [name for name in (MOMENTS, MERGED) if (self.folder / name).exists()]
            if others:
                raise OutputError(
                    f"{self.folder} holds {' and '.join(others)} of results that are gone. Remove it, or choose another --work."
                )
            machine = f"{platform.machine()}, Python {platform.python_version()}"
            fresh: dict[str, Any] = {
                "part": "published",
                "of": identity,
                "reference": {},
                "gains": {},
                "alignment": {},
                "methods": {},
                "skipped_tasks": {},
            }
            return {**fresh, "machine": machine, "versions": library_versions()}
        try:
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
            before = found["of"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{file} holds no results ({first_line(error)}). Remove it, or choose another --work.") from error
        other = [f"{part}.{key}" for part in identity for key in _differences(before.get(part), identity[part])]
        if other:
            raise OutputError(f"{file} holds results of other settings; {differing(other)}. Remove its folder, or choose another --work.")
        return found

    def _save(self, done: str | None) -> None:
        replace_json(self.folder / RESULTS, self.results)
        if done is not None:
            self.note(done)

    def _remove_partial(self) -> None:
        """Remove what an interrupted merge has left."""
        for path in (self.folder / MERGED).glob(f".*{PARTIAL_MARK}*"):
            shutil.rmtree(path, ignore_errors=True)


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows of a table: of every method the scale chosen on validation, what is kept there and on test, and tasks at that scale."""
    tasks = results["reference"]["instruct"]["tasks"]
    measures = [(task, measure) for task, row in tasks.items() for measure in row if not measure.endswith("_stderr")]
    rows = []
    for name, row in results["methods"].items():
        chosen = row["chosen"].get(repr(row["scale"]), {"tasks": {}})
        best = None if row["scale"] is None else row["validation"][repr(row["scale"])]
        scored = [chosen["tasks"].get(task, {}).get(measure) for task, measure in measures]
        figures = [row["scale"], best, row["test"], row["untuned"], *scored]
        rows.append([name, *("–" if figure is None else f"{figure:.3g}" for figure in figures)])
    return [["method", "scale", "validation", "test", "test at scale 1", *(measure for _, measure in measures)], *rows]


def _tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise SourceError(f"{directory} holds no tokenizer that can be loaded: {first_line(error)}") from error


def _files(directory: Path) -> list[list[Any]]:
    """Name, size and time of change of the weight files, as a directory has no revision."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(directory.glob("*.safetensors"))]


def _differences(one: Any, other: Any) -> list[str]:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else ["value"]
    return [str(key) for key in {**one, **other} if one.get(key) != other.get(key)]
