"""Merging and forgetting: onto + Σ scale · pure vector, streamed tensor by tensor into a complete model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lata_lightning.alignment import RANKING
from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.merging.methods import Method, OneVector, Summand, check_method
from lata_lightning.merging.vocabularies import Fitted, Vocabulary, check_vocabulary, fit_vocabularies
from lata_lightning.merging.weigh import check_asked_for
from lata_lightning.numerics.chunks import in_parallel, worker_count
from lata_lightning.numerics.combine import Part, combined
from lata_lightning.store.directories import MERGE_RECORD
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.model_directory import copy_companions
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import named_like, pair, pair_names
from lata_lightning.store.sources import Fingerprinted, Source, View
from lata_lightning.store.writer import (
    MAX_SHARD_BYTES,
    Progress,
    ShardWriter,
    atomic_directory,
    check_free_directory,
    float_dtype,
    layout_size,
    write_json,
)
from lata_lightning.vectors.aligning import check_same_model, check_same_start
from lata_lightning.vectors.cards import merge_card
from lata_lightning.vectors.manifest import Identity, library_versions
from lata_lightning.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Term:
    """One summand of a merge.

    Attributes:
        vector: Its coefficients, if it has any, weight its layers. Coefficients that were read from a file are refused where the alignments behind them
            are too flat to rank by: say what to apply, by ``unweighted()``, ``weighted(…)`` or ``lata_lightning.merging.weigh.weigh``.
        scale: Multiplier of the whole vector, dimensionless; any finite number.
        tuned: The tuned model itself, if it is at hand: a merge over different vocabularies compares its tokens and takes new rows from it.
    """

    vector: TaskVector
    scale: float = 1.0
    tuned: str | Path | nn.Module | Mapping[str, Tensor] | Source | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise LataError(f"the scale of {self.vector.label} must be a finite number, got {self.scale}")
        if self.vector.start == "base" and self.vector.manifest.coefficients is not None:
            raise LataError(
                f"{self.vector.label} started from base, so its coefficients belong to what remains after the instruction vector is taken off: "
                "give the instruction vector too (without(instruction_vector))"
            )
        check_asked_for(self.vector)

    def factor(self, name: str) -> float:
        """Scale times coefficient of a tensor; 0 where the vector is known to be zero."""
        return 0.0 if name in self.vector.unchanged else self.scale * self.vector.coefficient_of(name)

    def record(self) -> dict[str, Any]:
        """What the merge record says of this term."""
        manifest = self.vector.manifest
        return {
            "vector": self.vector.label,
            "kind": manifest.kind,
            "start": {"kind": manifest.start, **asdict(manifest.start_identity)},
            "tuned": asdict(manifest.tuned_identity),
            "scale": self.scale,
            "weighting": manifest.weighting,
            "threshold": manifest.threshold if manifest.weighting == "threshold" else None,
            "level": manifest.level,
            "outside": 1.0 if manifest.coefficients is None else manifest.outside,
            "coefficients": None if manifest.coefficients is None else dict(manifest.coefficients),
            "weighting_asked_for": manifest.asked_for,
            **(dict.fromkeys(RANKING) if manifest.alignment is None else manifest.alignment.ranking()),
        }


def merge(
    onto: str | Path | nn.Module | Mapping[str, Tensor] | Source,
    terms: Sequence[Term],
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check_base: bool = True,
    vocabulary: Vocabulary | None = None,
    method: Method = "sum",
    device: str = "cpu",
    command: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Write onto + Σ scale · coefficient · vector as a model directory.

    The sum of a tensor is formed in float64 and rounded once to the output dtype. A tensor on which no vector acts is written as it is.

    Args:
        onto: The model to add to. Config, tokenizer and other small files of its directory are copied.
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet; it appears complete or not at all.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default each tensor keeps the dtype it has in ``onto``.
        max_shard_bytes: Bytes of tensors per file.
        check_base: Refuse vectors that are known to start from different weights.
        vocabulary: What to do where the vocabularies differ; by default that is refused. ``"onto"`` keeps the rows of ``onto`` and drops those
            that only a vector has. ``"union"`` adds them with the values of the tuned model (``Term.tuned``), whatever scale and coefficients
            are, together with its tokenizer. Rows that only ``onto`` has stay as they are. Nothing else changes where the vocabulary is one.
        method: ``"sum"`` adds the vectors as they are. ``"regression"``, ``"tsv"`` and ``"iso"`` make one vector of all first, matrix by matrix, as
            ``lata_lightning.linearity.from_vectors.merge_matrices`` does; coefficients and different scales are refused then. Nothing of the size of the
            model is in memory, or on disk in between.
        device: Where matrices are solved, for a method that does so, such as ``"cuda"``.
        command: Recorded in the card as how the model was made.
        workers: Threads that merge a tensor each; by default one for each processor, up to four. The result does not depend on it.
        progress: Called after each piece that is written, with the bytes written so far and the bytes in all.
        note: Called before anything is written with each sentence about rows that are not shared; they are in the record and card as well.

    Returns:
        The output directory. Nothing else changes.

    Raises:
        LayoutMismatchError: A vector does not hold the tensors of ``onto``, or belongs to a model of other tokens or of another function; or, with
            ``vocabulary``, a row is another token on each side, or a
            union would need rows that are not at hand.
        BaseMismatchError: Two vectors start from different weights.
        OutputError: The output exists, or the disk is full.
        CorruptFileError: Weights are not finite.
        LataError: No vector is given, the dtype, the vocabulary, the method or the device is unknown, or the vectors cannot be made into one.

    Source: LATA, arXiv:2502.20186, task learning; with all coefficients 1, task arithmetic, arXiv:2212.04089. Other methods: see the source of each.
    """
    target = Path(output)
    check_free_directory(target)
    cast_to = None if dtype is None else float_dtype(dtype)
    rows_of = None if vocabulary is None else check_vocabulary(vocabulary)
    threads = worker_count(workers)
    check_method(method, device)
    if not terms:
        raise LataError("there is nothing to merge: give at least one vector")
    if check_base:
        check_same_start([term.vector for term in terms])
    source = named_like(open_source(onto), terms[0].vector.tensors)
    onto_weights, fitted = _match(source, terms, rows_of)
    check_same_model(source, [term.vector for term in terms], by_token=rows_of is None)
    if note is not None:
        for sentence in fitted.notes:
            note(sentence)
    vectors = [term.vector for term in terms]
    one = None if method == "sum" else OneVector(vectors, fitted.vectors, [term.scale for term in terms], method, device)
    summands = [Summand(reader, term.factor) for reader, term in zip(fitted.vectors, terms, strict=True)] if one is None else [one.summand]
    integers = {name for name in source.names if not source.dtype(name).is_floating_point}
    layout = {name: (cast_to or onto_weights.dtype(name), fitted.onto.shape(name)) for name in onto_weights.names}
    layout |= {name: (source.dtype(name), source.shape(name)) for name in source.names if name in integers}
    size = layout_size(layout)
    with atomic_directory(target, size) as directory:
        metadata = {"format": "pt"}
        with ShardWriter(directory, "model", layout, max_shard_bytes=max_shard_bytes, metadata=metadata, progress=progress) as writer:

            def write(name: str) -> None:
                if name in integers:
                    writer.write(name, source.read(name))
                    return
                acting = [(summand.reader, factor) for summand in summands if (factor := summand.factor(name)) != 0]
                parts = [_part(fitted.onto, reader, name, factor) for reader, factor in acting]
                dtype, shape = layout[name]
                try:
                    writer.stream(name, combined(prod(shape), fitted.onto.load(name), parts, dtype))
                except CorruptFileError as error:
                    among = ", ".join([source.label, *(reader.label for reader, _ in acting)])
                    raise CorruptFileError(f"{name}: {error} in one of {among}") from error

            parallel = all(side.parallel for side in (source, fitted.onto, *fitted.vectors))
            in_parallel(write, writer.order, threads if parallel else 1)
        identity = Identity(source.location, source.revision, content_hash(onto_weights.hashes))
        record = {
            "onto": asdict(identity),
            "terms": [term.record() for term in terms],
            "derivation": None if one is None else one.record(),
            "vocabulary": None
            if fitted.rows is None
            else {"rows_of": vocabulary, "before": fitted.rows[0], "after": fitted.rows[1], "notes": list(fitted.notes)},
            "command": command,
            "content_hash": content_hash(writer.hashes),
            "tensors": writer.hashes,
            "versions": library_versions(),
        }
        copy_companions(source, directory, dtype, config=fitted.config, tokenizer=fitted.tokenizer)
        write_json(directory / MERGE_RECORD, record)
        (directory / "README.md").write_text(merge_card(target.name, record), "utf-8")
    return target


def forget(target: str | Path | nn.Module | Mapping[str, Tensor] | Source, term: Term, output: str | Path, **options: Any) -> Path:
    """Write target − scale · coefficient · vector as a model directory: the merge of the negated term.

    Args:
        target: The model that has the unwanted skill.
        term: The unwanted vector and how much of it to take off.
        output: A directory that does not exist yet.
        options: As for ``merge``.

    Source: LATA, arXiv:2502.20186, task forgetting.
    """
    return merge(target, [replace(term, scale=-term.scale)], output, **options)


def _part(onto: Source, reader: Source, name: str, factor: float) -> Part:
    """One summand of a tensor, computed from two models without reading anything twice."""
    sides = reader.sides(name)
    if sides is None:
        return Part(factor, reader.load(name))
    tuned, start, held = sides
    if start.place(held) is not None and start.place(held) == onto.place(name):
        return Part(factor, tuned.load(held), from_onto=True)
    return Part(factor, tuned.load(held), start.load(held))


def _match(source: Source, terms: Sequence[Term], vocabulary: Vocabulary | None) -> tuple[Fingerprinted, Fitted]:
    """The floating weights to add to, and every vector, under one set of names and with one set of rows."""
    weights: Source = View(source, {name: name for name in source.names if source.dtype(name).is_floating_point})
    bring = pair if vocabulary is None else pair_names
    readers: list[Source] = []
    models: list[Source | None] = []
    for term in terms:
        weights, reader = bring(weights, term.vector.tensors)
        readers.append(reader)
        models.append(None if vocabulary is None or term.tuned is None else pair_names(weights, open_source(term.tuned))[1])
    onto = Fingerprinted(weights)
    if vocabulary is None:
        return onto, Fitted(onto, readers, None, onto, source.config, ())
    return onto, fit_vocabularies(onto, readers, models, [term.vector.manifest.meaning for term in terms], vocabulary)
