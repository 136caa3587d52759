"""Merging and forgetting: onto + Σ scale · pure vector, streamed tensor by tensor into a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.linearity.methods import Method
from lata_lightning.merging.matching import Matched, match_terms, summand
from lata_lightning.merging.methods import OneVector, check_method
from lata_lightning.merging.term import Term as Term
from lata_lightning.merging.vocabularies import Fitted, Vocabulary, check_vocabulary, fit_vocabularies
from lata_lightning.numerics.chunks import in_parallel, worker_count
from lata_lightning.numerics.combine import combined
from lata_lightning.store.companions import Companions, companions_of, note_on_modules
from lata_lightning.store.directories import MERGE_RECORD, local_directory
from lata_lightning.store.dtypes import float_dtype
from lata_lightning.store.hashing import content_hash
from lata_lightning.store.model_directory import finished_config
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import named_like, pair_names
from lata_lightning.store.seal import sealed
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Fingerprinted
from lata_lightning.store.writer import (
    MAX_SHARD_BYTES,
    Progress,
    ShardWriter,
    atomic_directory,
    check_free_directory,
    layout_size,
    write_config,
)
from lata_lightning.vectors.aligning import check_same_model, check_same_start
from lata_lightning.vectors.cards import merge_card
from lata_lightning.vectors.manifest import library_versions
from lata_lightning.vectors.provenance import Identity


def merge(
    onto: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource,
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
    leave_out: Sequence[str] = (),
    check_start: bool = False,
) -> Path:
    """Write onto + Σ scale · coefficient · vector as a model directory.

    Each tensor is summed in float64 and rounded once to the output dtype. A tensor that no vector changes is copied. Buffers, such as running statistics,
    are not scaled: they are copied from the tuned model of the one vector that changed them, or averaged over several; under a negative scale those of
    ``onto`` are kept.

    Args:
        onto: The model to add to. The other files in its directory are copied, except weights in other formats and caches of tools; a note names those.
        terms: The vectors, each with its scale.
        output: A directory that does not exist yet; written atomically.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default each tensor keeps the dtype it has in ``onto``.
        max_shard_bytes: Largest number of bytes of tensors per file.
        check_base: Refuse vectors that are known to start from different weights.
        vocabulary: How to treat vocabularies that differ; by default they are refused. ``"onto"`` keeps the rows of ``onto`` and drops those that only a
            vector has. ``"union"`` adds them, unscaled, with the values of the tuned model (``Term.tuned``), and takes its tokenizer. Rows that only
            ``onto`` has are kept. Equal vocabularies are not affected.
        method: ``"sum"`` adds the vectors. ``"regression"``, ``"tsv"`` and ``"iso"`` first make one vector of all, matrix by matrix, as
            ``lata_lightning.linearity.from_vectors.merge_matrices`` does; they refuse coefficients and different scales. No method stores the whole model
            or vector in memory, or in a temporary file.
        device: Device to solve matrices on, such as ``"cuda"``, for methods that do.
        command: The command that makes the model, recorded in its card.
        workers: Number of threads, each merging one tensor; by default one for each processor, up to four. The result does not depend on it.
        progress: Called after each chunk, with the bytes written so far and the bytes in all.
        note: Called, before anything is written, with sentences about rows that are not shared (also in record and card) and files that are not copied.
        leave_out: Regular expressions, searched in tensor names: tensors that match are kept as in ``onto``.
        check_start: Refuse a model that is known to differ from the one that a vector started from.

    Returns:
        The output directory. No input changes.

    Raises:
        LayoutMismatchError: The tensors of a vector are not those of ``onto``, or its model has other tokens or computes another function; or, with
            ``vocabulary``, a row is a different token on each side, or a union needs the rows of a tuned model that is not given.
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
    left_out = LeaveOut(leave_out)
    known = {pattern for term in terms for pattern in term.vector.manifest.leave_out}
    every = [name for side in (source, *(term.vector.tensors for term in terms)) for name in side.names]
    LeaveOut(pattern for pattern in left_out.patterns if pattern not in known).check_used(every, f"{source.label} and the vectors")
    matched = match_terms(source, terms, left_out, same_shapes=rows_of is None)
    onto_weights, fitted = _fitted(source, matched, rows_of, left_out)
    check_same_model(source, [term.vector for term in terms], by_token=rows_of is None)
    companions = companions_of(source, fitted.tokenizer)
    for sentence in (*fitted.notes, *_notes_on(source, companions), *_notes_on_modules(source, terms)):
        if note is not None:
            note(sentence)
    one = None if method == "sum" else OneVector(matched, fitted.vectors, method, device)

    def acting_on(name: str) -> list[tuple[TensorSource, float]]:
        # The method does not apply to buffers.
        if one is None or name in matched.shares:
            sides = list(zip(fitted.vectors, matched.factors(name), strict=True))
        else:
            sides = [(one.merged, one.factor(name))]
        return [(reader, factor) for reader, factor in sides if factor != 0]

    integers = {name for name in source.names if not source.dtype(name).is_floating_point}
    layout = {name: (cast_to or onto_weights.dtype(name), fitted.onto.shape(name)) for name in onto_weights.names}
    layout |= {name: (source.dtype(name), source.shape(name)) for name in source.names if name in integers}
    size = layout_size(layout) + companions.size
    with atomic_directory(target, size) as directory:
        metadata = {"format": "pt"}
        with ShardWriter(directory, "model", layout, max_shard_bytes=max_shard_bytes, metadata=metadata, progress=progress) as writer:

            def write(name: str) -> None:
                if name in integers:
                    writer.write(name, source.read(name))
                    return
                acting = acting_on(name)
                parts = [summand(fitted.onto, reader, name, factor) for reader, factor in acting]
                dtype, shape = layout[name]
                try:
                    writer.stream(name, combined(prod(shape), fitted.onto.chunks(name), parts, dtype))
                except CorruptFileError as error:
                    among = ", ".join([source.label, *(reader.label for reader, _ in acting)])
                    raise CorruptFileError(f"{name}: {error} in one of {among}") from error

            parallel = all(side.parallel for side in (source, fitted.onto, *fitted.vectors))
            in_parallel(write, writer.order, threads if parallel else 1)
        if check_start:
            matched.check_start(onto_weights.hashes, source.label)
        identity = Identity(source.location, source.revision, content_hash(onto_weights.hashes))
        record = {
            "format_version": 2,
            "onto": asdict(identity),
            "terms": [term.record() for term in terms],
            "derivation": None if one is None else one.record(),
            "vocabulary": None
            if fitted.rows is None
            else {"rows_of": vocabulary, "before": fitted.rows[0], "after": fitted.rows[1], "notes": list(fitted.notes)},
            "left_out": list(companions.left_out),
            "command": command,
            "content_hash": content_hash(writer.hashes),
            "tensors": writer.hashes,
            "versions": library_versions(),
        }
        companions.copy_to(directory)
        config = finished_config(source, dtype, fitted.config)
        if config is not None:
            write_config(directory / "config.json", config)
        (directory / MERGE_RECORD).write_text(sealed(record), "utf-8")
        (directory / "README.md").write_text(merge_card(target.name, record), "utf-8")
    return target


def forget(target: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource, term: Term, output: str | Path, **options: Any) -> Path:
    """Write target − scale · coefficient · vector as a model directory.

    Args:
        target: The model with the unwanted skill.
        term: The vector of the unwanted skill, and the scale at which to subtract it.
        output: A directory that does not exist yet.
        options: As for ``merge``.

    Source: LATA, arXiv:2502.20186, task forgetting.
    """
    return merge(target, [replace(term, scale=-term.scale)], output, **options)


def _notes_on(source: TensorSource, companions: Companions) -> list[str]:
    """Return sentences about files that are not copied."""
    if source.directory is None and source.location is not None:
        return [
            f"{source.label} lies in no model directory of its own, so no config and no tokenizer come along: the output holds weights only"
        ]
    return [] if companions.note is None else [companions.note]


def _notes_on_modules(source: TensorSource, terms: Sequence[Term]) -> list[str]:
    """Return sentences about modules beside the tuned models, which are not merged."""
    tuned = [str(term.tuned) for term in terms if isinstance(term.tuned, str | Path)]
    advice = f"the output has those of {source.label}"
    notes = [note_on_modules(source.directory, local_directory(path), path, advice) for path in tuned]
    return [note for note in notes if note is not None]


def _fitted(source: TensorSource, matched: Matched, vocabulary: Vocabulary | None, leave_out: LeaveOut) -> tuple[Fingerprinted, Fitted]:
    """Return the floating weights to add to, and every vector, with one set of rows."""
    onto = Fingerprinted(matched.onto)
    if vocabulary is None:
        return onto, Fitted(onto, list(matched.readers), None, onto, source.config, ())
    models = [None if term.tuned is None else pair_names(onto, open_source(term.tuned), leave_out)[1] for term in matched.terms]
    return onto, fit_vocabularies(onto, list(matched.readers), models, [term.vector.manifest.meaning for term in matched.terms], vocabulary)
