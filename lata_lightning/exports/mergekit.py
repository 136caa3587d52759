"""Exporting a directory for mergekit: its configuration, and the models it needs besides the start."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lata_lightning.errors import LataError, first_three
from lata_lightning.exports.cards import mergekit_card
from lata_lightning.exports.structure import Structure
from lata_lightning.merging.merge import Term, merge
from lata_lightning.merging.sum import Onto, Sum
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.writer import Progress, atomic_directory, check_free_directory
from lata_lightning.vectors.task_vector import TaskVector

# In a path, mergekit takes a plus for an adapter and an at sign for a revision.
_SPLITS = "+@"


def export_mergekit(
    terms: Sequence[Term],
    output: str | Path,
    *,
    onto: Onto | None = None,
    dtype: str = "float32",
    check_base: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write ``merge.yaml`` with the exact weight of every tensor, and one model for each vector: start + 1 · vector.

    If the tuned model of a vector is still at its recorded location, and its difference to the start is the vector bit for bit, the configuration names
    that model and none is written. ``mergekit-yaml merge.yaml OUTPUT`` runs in the directory.

    Args:
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet; written atomically.
        onto: The start model, if it is not at the location that the first vector records; a model directory or a hub id.
        dtype: Dtype of the models that are written.
        check_base: Refuse a start model that is known to differ from the one that a vector started from.
        progress: Called while models are written.

    Raises:
        LataError: The start is not a model directory, a path contains a character with a special meaning for mergekit, or experts that mergekit merges
            as one tensor have different weights.
        BaseMismatchError: A vector started from another model.
        LayoutMismatchError, CorruptFileError, OutputError: As for ``merge``.
    """
    target = Path(output)
    check_free_directory(target)
    total = Sum(terms, onto, check_base=check_base)
    source = total.source
    start = start_for_mergekit(source)
    if check_base:
        total.check_start()
    structure = None if meta_model(source.config) is None else Structure(source)
    weights = [_weights(term, {name: total.factors(name)[number] for name in total.names}, structure) for number, term in enumerate(terms)]
    models: list[tuple[Term, str, bool]] = []
    with atomic_directory(target) as directory:
        for number, term in enumerate(terms, start=1):
            tuned = _tuned(term.vector, source)
            path = f"./vector-{number}" if tuned is None else tuned
            if tuned is None:
                plain = Term(term.vector.unweighted())
                merge(source, [plain], directory / f"vector-{number}", dtype=dtype, check_base=check_base, progress=progress)
            models.append((term, path, tuned is None))
        out = str(max((source.dtype(name) for name in total.names), key=lambda kind: kind.itemsize)).removeprefix("torch.")
        lines = [
            "merge_method: task_arithmetic",
            f"base_model: {json.dumps(start)}",
            "dtype: float32",
            f"out_dtype: {out}",
            "parameters:",
            "  normalize: false",
            "  lambda: 1.0",
            "models:",
        ]
        for (_, path, _), factors in zip(models, weights, strict=True):
            lines += _model(path, factors)
        (directory / "merge.yaml").write_text("\n".join(lines) + "\n", "utf-8")
        (directory / "README.md").write_text(mergekit_card(target.name, start, models, {"dtype": dtype, "out_dtype": out}), "utf-8")
    return target


def start_for_mergekit(source: TensorSource) -> str:
    """Return the name of the start model for mergekit's configuration.

    Raises:
        LataError: It is not a model directory, or its path contains a character with a special meaning for mergekit.
    """
    if source.directory is None or source.config is None:
        raise LataError(
            f"mergekit reads model directories with a config.json only, and {source.label} is none: name one (onto=…, --onto MODEL)"
        )
    # A hub id is kept, as mergekit downloads it itself.
    return str(source.location) if source.revision is not None else _path(source.directory)


def _weights(term: Term, factors_of: Mapping[str, float], structure: Structure | None) -> dict[str, float]:
    """Return the factor of every tensor, by its name in the checkpoint and by its name in transformers, which mergekit may use instead."""
    weights = dict(factors_of)
    for tensor in () if structure is None else structure.by_name.values():
        factors = {weights[name] for name in tensor.stored_names if name in weights}
        if len(factors) > 1:
            raise LataError(
                f"mergekit merges {tensor.names[0]} as one tensor, and {term.vector.label} has {len(factors)} weights for its parts, "
                f"{first_three(tensor.stored_names)}. Measure the alignment by block or submodule, or use lata merge."
            )
        for name in tensor.names if factors else ():
            weights.setdefault(name, *factors)
    return weights


def _model(path: str, weights: dict[str, float]) -> list[str]:
    """Return the entry of one model, with a filter for each tensor: mergekit takes the first filter that is part of a tensor's name."""
    lines = [f"  - model: {json.dumps(path)}", "    parameters:", "      weight:"]
    for name in sorted(weights, key=lambda name: (-len(name), name)):
        lines += [f"        - filter: {json.dumps(name)}", f"          value: {_number(weights[name])}"]
    return [*lines, "        - value: 0.0"]


def _number(value: float) -> str:
    """Format a number for YAML, which reads 1e-05 as a text but 1.0e-05 as a number."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _path(directory: Path) -> str:
    path = str(directory.resolve())
    if set(_SPLITS) & set(path):
        raise LataError(
            f"mergekit takes + and @ in a path for adapters and revisions, and {path} has one: move the model to a path without"
        )
    return path


def _tuned(vector: TaskVector, start: TensorSource) -> str | None:
    """Return the path of the tuned model of a vector, if it exists and its difference to the start is exactly this vector."""
    location = vector.manifest.tuned_identity.location
    if location is None or not (Path(location) / "config.json").is_file() or set(_SPLITS) & set(str(Path(location).resolve())):
        return None
    try:
        difference = TaskVector.between(start, open_source(location))
    except LataError:
        return None
    same = set(difference) == set(vector) and all(torch.equal(difference[name], vector[name]) for name in vector)
    return _path(Path(location)) if same else None
