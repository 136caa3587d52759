"""The task vector: a lazy mapping from tensor name to difference, in memory or in its directory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.alignment import Alignment
from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, WeightingError, first_three
from lata_lightning.layers import DeferredLayerMap, LayerMap, LayerRule, Level, check_level, layer_map, skeleton
from lata_lightning.moments import Start, check_start
from lata_lightning.numerics.chunks import Load, in_parallel, pieces_of, slices, worker_count
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.numerics.measure import all_finite
from lata_lightning.store.adapters import AdapterDifference
from lata_lightning.store.directories import MANIFEST_NAME, shard_files
from lata_lightning.store.file_source import open_safetensors
from lata_lightning.store.opening import open_difference, open_source
from lata_lightning.store.pairing import check_same_tensors, pair
from lata_lightning.store.sources import Source, hashes_of
from lata_lightning.store.writer import (
    MAX_SHARD_BYTES,
    Progress,
    ShardWriter,
    atomic_directory,
    check_free,
    float_dtype,
    layout_size,
    write_json,
)
from lata_lightning.vectors.cards import vector_card
from lata_lightning.vectors.differences import Difference, LossMeter, Scaled, Stored
from lata_lightning.vectors.manifest import (
    Derivation,
    FactorEntry,
    Identity,
    Kind,
    Manifest,
    Measured,
    TensorEntry,
    factor_names,
    read_manifest,
)
from lata_lightning.weighting import CLOSED_FORM, DEFAULT_THRESHOLD, ORIGINS, Origin, Weighting, coefficients

STEM = "delta"


class TaskVector(Mapping[str, Tensor]):
    """Tuned minus start, tensor by tensor, each computed or read when it is asked for.

    ``TaskVector.between(start, tuned)`` makes one from two sets of weights, ``TaskVector.open(path)`` reads a saved one. A vector
    behaves as a mapping from tensor name to a tensor on the CPU (float32, or float64 where the weights are), in the order of the
    model's file, and never changes: ``weighted``, ``pure`` and ``without`` return new ones that share the same tensors.

    Attributes:
        tensors: The source the differences come from.
        manifest: Everything known about them.
    """

    def __init__(self, tensors: Source, manifest: Manifest) -> None:
        self.tensors = tensors
        self.manifest = manifest

    @classmethod
    def between(
        cls,
        start: str | Path | nn.Module | Mapping[str, Tensor] | Source,
        tuned: str | Path | nn.Module | Mapping[str, Tensor] | Source,
        *,
        kind: Kind = "task",
        start_kind: Start = "instruct",
        layers: LayerRule | str | None = None,
    ) -> TaskVector:
        """The difference of two sets of weights; nothing is read before a tensor is asked for.

        Args:
            start: Where the fine-tune started: directory, ``.ckpt``, hub id, module or state dict. For an instruction vector, base.
            tuned: Where it ended; for an instruction vector, instruct. May be a peft adapter directory with LoRA trained on ``start``: the vector
                then is what the adapter adds, held as its factors.
            kind: ``"task"``, or ``"instruction"`` for instruct − base.
            start_kind: Whether ``start`` is the instruct model or the base model.
            layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).

        Returns:
            A vector over all floating tensors of the model. Tensors of integers are no weights; they must be equal on both sides.

        Raises:
            LayoutMismatchError: The two sides differ in names, shapes, vocabulary or integer tensors.
            SourceError, CorruptFileError: One side cannot be read.
        """
        start_source = open_source(start)
        added = open_difference(tuned, start_source)
        tuned_source: Source
        difference: Source
        if added is not None:
            tuned_source, difference, unchanged = added, added, added.unchanged
        else:
            start_source, tuned_source = pair(start_source, open_source(tuned))
            difference, unchanged = Difference(start_source, tuned_source, _floating(start_source, tuned_source)), frozenset()

        def place() -> LayerMap:
            structure = start if isinstance(start, nn.Module) else skeleton(start_source.config) if start_source.config else None
            return layer_map(difference.names, structure=structure, rule=layers)

        # A rule is tried at once, as it may be wrong.
        places = place() if layers is not None else DeferredLayerMap(place)
        manifest = Manifest(
            kind=kind,
            start=check_start("base" if kind == "instruction" else start_kind),
            layers=places,
            start_identity=Identity(start_source.location, start_source.revision),
            tuned_identity=Identity(tuned_source.location, tuned_source.revision),
            tensors={name: TensorEntry(difference.shape(name), "float32", unchanged=True) for name in unchanged},
        )
        return cls(difference, manifest)

    @classmethod
    def open(cls, path: str | Path) -> TaskVector:
        """A saved task vector; its tensors stay on disk until they are asked for.

        Raises:
            SourceError: The path is no task vector.
            CorruptFileError: A file is truncated, or is not what the manifest says.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        stored = open_safetensors(shard_files(directory, STEM), path)
        expected = {held: shape for name, entry in manifest.tensors.items() for held, (shape, _) in entry.stored(name).items()}
        wrong = set(stored.names) ^ set(expected)
        wrong |= {name for name in expected if name in stored.names and stored.shape(name) != expected[name]}
        if wrong:
            raise CorruptFileError(
                f"the tensors of {directory} are not those of its manifest; different are {first_three(wrong)}. Copy it again."
            )
        return cls(Stored(stored, manifest), manifest)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        return self.tensors.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors.names)

    def __len__(self) -> int:
        return len(self.tensors.names)

    def __repr__(self) -> str:
        return f"TaskVector({self.label}, {len(self)} tensors)"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.tensors.shape(name)

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:
        """A part of a tensor; all of it for None. Of a saved vector only that part is read."""
        return self.tensors.read_slice(name, slices)

    def low_rank(self, name: str) -> LowRank | None:
        """A tensor as factors, if it is held so, as that of a LoRA run; None otherwise."""
        return self.tensors.low_rank(name)

    def held(self, name: str) -> Tensor | LowRank:
        """A tensor in the form it is held in, for sums that do not need the dense one."""
        factors = self.low_rank(name)
        return self[name] if factors is None else factors

    @property
    def label(self) -> str:
        """Short name for messages: its path, or the two sides it lies between."""
        return self.tensors.label

    @property
    def layers(self) -> LayerMap:
        """Place of every tensor."""
        return self.manifest.layers

    @property
    def start(self) -> Start:
        """What the fine-tune started from."""
        return self.manifest.start

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.tensors.names)

    @cached_property
    def unchanged(self) -> frozenset[str]:
        """Tensors that are known to be zero without reading them."""
        return frozenset(name for name, entry in self.manifest.tensors.items() if entry.unchanged)

    def coefficient_of(self, name: str) -> float:
        """The coefficient of the layer that holds a tensor; 1 as long as no rule has been applied."""
        if self.manifest.coefficients is None:
            return 1.0
        layer = self.layers.layer_of(name, self.manifest.level)
        return self.manifest.outside if layer is None else self.manifest.coefficients[layer]

    def weighted(
        self,
        alignment: Alignment,
        weighting: Weighting,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        instruction_vector: TaskVector | None = None,
    ) -> TaskVector:
        """The same vector with coefficients that follow from an alignment.

        Args:
            alignment: What ``align`` measured on this vector.
            weighting: ``"linear"``, ``"log"``, ``"threshold"``, or ``"none"``, which gives 1 to every layer.
            threshold: For ``"threshold"``.
            outside: Coefficient of embeddings, final norm, head and whatever else belongs to no layer; 1 with ``"none"``.
            instruction_vector: Recorded as what the alignment was measured with.

        Raises:
            WeightingError: The rule is unknown, or the layers cannot be ranked.
        """
        found = coefficients(alignment, weighting, threshold)
        if weighting == "none":
            # Plain task arithmetic weights nothing, inside the layers or outside.
            outside = 1.0
        instruction = (
            None if instruction_vector is None else (instruction_vector.manifest.start_identity, instruction_vector.manifest.tuned_identity)
        )
        manifest = replace(
            self.manifest,
            level=alignment.level,
            start=alignment.start,
            outside=outside,
            weighting=weighting,
            threshold=threshold,
            coefficients=found,
            alignment=alignment.with_coefficients(found, outside),
            instruction_identity=instruction,
        )
        return TaskVector(self.tensors, manifest)

    def with_coefficients(
        self, coefficients: Mapping[str, float], *, level: Level = "block", outside: float = 0.0, weighting: Origin = CLOSED_FORM
    ) -> TaskVector:
        """The same vector with coefficients that were found elsewhere.

        Args:
            coefficients: One finite number for each layer.
            level: Unit of the layers.
            outside: Coefficient of the tensors that belong to no layer.
            weighting: Recorded as where they come from: a rule, or ``"closed-form"``.

        Returns:
            A vector that keeps its alignment, if it has one, as what was measured.

        Raises:
            WeightingError: They cannot come from there.
            LataError: The layers are not those of this vector, or a number is not finite.
        """
        if weighting not in ORIGINS:
            raise WeightingError(f"coefficients cannot come from {weighting!r}; choose one of {', '.join(ORIGINS)}")
        layers = set(self.layers.layers(check_level(level)))
        if set(coefficients) != layers:
            raise LataError(
                f"there must be one coefficient for each {level} of {self.label}; on one side only are {first_three(set(coefficients) ^ layers)}"
            )
        odd = [layer for layer, number in coefficients.items() if not isfinite(number)]
        if odd or not isfinite(outside):
            raise LataError(f"coefficients must be finite numbers; they are not in {first_three(odd or ['outside'])}")
        measured = self.manifest.alignment
        if measured is not None:
            measured = measured.with_coefficients(coefficients if measured.level == level else None, outside)
        manifest = replace(
            self.manifest, level=level, outside=outside, weighting=weighting, coefficients=dict(coefficients), alignment=measured
        )
        return TaskVector(self.tensors, manifest)

    def derivation(self) -> Derivation | None:
        """How the vector was made of others, with what was measured while its tensors were read; None if it was not."""
        found = self.manifest.derivation
        measured = tuple(Measured(name, layers, vector) for (name, vector), layers in self.tensors.measured().items())
        return replace(found, measured=measured) if found is not None and measured else found

    def unweighted(self) -> TaskVector:
        """The same vector without coefficients, as plain task arithmetic takes it."""
        return TaskVector(self.tensors, replace(self.manifest, coefficients=None, weighting="none"))

    def pure(self) -> TaskVector:
        """The pure vector: each layer times its coefficient.

        Raises:
            LataError: No coefficients are stored, or the vector started from base (see ``without``).
        """
        if self.manifest.coefficients is None:
            raise LataError(f"{self.label} has no coefficients: measure its alignment and apply a weighting first")
        if self.start == "base":
            raise LataError(
                f"{self.label} started from base, so it contains the instruction vector: take it off first with without(instruction_vector)"
            )
        frozen = {name: entry for name, entry in self.manifest.tensors.items() if entry.unchanged}
        return TaskVector(
            Scaled(self.tensors, self.coefficient_of, f"the pure vector of {self.label}"),
            replace(self.manifest, coefficients=None, weighting="none", alignment=None, tensors=frozen),
        )

    def without(self, instruction_vector: TaskVector) -> TaskVector:
        """The task vector in a vector that started from base: complex vector minus instruction vector.

        Coefficients stay; the result counts from instruct.

        Raises:
            LataError: The vector did not start from base.
            LayoutMismatchError: The two do not hold the same tensors.
        """
        if self.start != "base":
            raise LataError(f"{self.label} started from instruct: there is no instruction vector in it to take off")
        check_same_tensors(self.tensors, instruction_vector.tensors)
        manifest = replace(self.manifest, start="instruct", start_identity=instruction_vector.manifest.tuned_identity, tensors={})
        return TaskVector(Difference(instruction_vector.tensors, self.tensors, self, identify=False), manifest)

    def save(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> TaskVector:
        """Write the vector to a directory, piece by piece, and return it opened from there.

        Args:
            path: A directory that does not exist yet. It appears complete or not at all.
            dtype: Precision to store: ``float32``, ``bfloat16`` or ``float16``. What a lower one costs is measured and recorded.
            max_shard_bytes: Bytes of tensors per file.
            workers: Threads that write a tensor each; by default one for each processor, up to four. The result does not depend on it.
            progress: Called after each piece with the bytes written so far and the bytes in all.

        Raises:
            OutputError: The path exists, or the disk is full.
            CorruptFileError: The difference is not finite, or does not fit the dtype.
            LataError: The dtype is unknown.
        """
        target, stored = Path(path), float_dtype(dtype)
        check_free(target)
        frozen = self.unchanged
        factors = {name: found for name in self if name not in frozen and (found := self.low_rank(name)) is not None}
        layout = {name: (stored, self.shape(name)) for name in self if name not in frozen and name not in factors}
        parts: dict[str, Tensor] = {}
        for name, found in factors.items():
            for index, part in enumerate(found.parts):
                parts.update(zip(factor_names(name, index), (part.left, part.right), strict=True))
        layout |= {name: (stored, tuple(side.shape)) for name, side in parts.items()}
        threads = worker_count(workers)
        losses = {name: LossMeter() for name in layout}
        with atomic_directory(target, layout_size(layout)) as directory:
            metadata = {"format": "pt"}
            with ShardWriter(directory, STEM, layout, max_shard_bytes=max_shard_bytes, metadata=metadata, progress=progress) as writer:

                def write(name: str) -> None:
                    load = slices(parts[name].cpu()) if name in parts else self.tensors.load(name)
                    meter = None if name in parts else losses[name]
                    writer.stream(name, self._lowered(name, load, math.prod(layout[name][1]), stored, meter))

                in_parallel(write, writer.order, threads if self.tensors.parallel else 1)
            loss = LossMeter()
            for name in layout:
                loss.take(losses[name])
            for found in factors.values():
                if any(torch.promote_types(side.dtype, stored) != stored for part in found.parts for side in (part.left, part.right)):
                    loss.add_factors(found, found.stored_as(stored))
            entries = {
                name: TensorEntry(
                    self.shape(name),
                    dtype,
                    writer.hashes.get(name),
                    unchanged=name in frozen,
                    factors=_factor_entries(name, factors[name], writer.hashes) if name in factors else None,
                )
                for name in self
            }
            manifest = replace(
                self.manifest, tensors=entries, precision_loss=loss.result(), derivation=self.derivation(), **self._identities()
            )
            write_json(directory / MANIFEST_NAME, manifest.to_json())
            (directory / "README.md").write_text(vector_card(manifest, target.name), "utf-8")
        return TaskVector.open(path)

    def _lowered(self, name: str, load: Load, count: int, stored: torch.dtype, loss: LossMeter | None) -> Iterator[Tensor]:
        """The pieces of a tensor in the precision they are stored in."""
        for begin, end in pieces_of(count):
            full = load(begin, end)
            lower = full.to(stored)
            self._check_stored(name, full, lower)
            if loss is not None and full.dtype != stored:
                loss.add(full, lower)
            yield lower

    def _check_stored(self, name: str, full: Tensor, lower: Tensor) -> None:
        if all_finite(lower):
            return
        held = str(lower.dtype).removeprefix("torch.")
        what = "holds NaN or infinite values" if not all_finite(full) else f"does not fit {held}; use bfloat16 or float32"
        raise CorruptFileError(f"{name} of {self.label} {what}")

    def _identities(self) -> dict[str, Any]:
        """Identities of both sides with the hashes that reading them has brought."""
        if not isinstance(self.tensors, Difference | AdapterDifference):
            return {}
        start, tuned = self.tensors.content_hashes()
        return {
            "start_identity": replace(self.manifest.start_identity, content_hash=self.manifest.start_identity.content_hash or start),
            "tuned_identity": replace(self.manifest.tuned_identity, content_hash=self.manifest.tuned_identity.content_hash or tuned),
        }


def _floating(start: Source, tuned: Source) -> list[str]:
    """Names of the floating tensors of two paired sources; the others must be equal."""
    found = [name for name in start.names if start.dtype(name).is_floating_point]
    for name in set(start.names) - set(found):
        if not torch.equal(start.read(name), tuned.read(name)):
            raise LayoutMismatchError(f"{name} holds integers, which must be equal in {start.label} and {tuned.label}")
    return found


def _factor_entries(name: str, factors: LowRank, hashes: Mapping[str, str]) -> tuple[FactorEntry, ...]:
    entries = []
    for index, part in enumerate(factors.parts):
        left, right = factor_names(name, index)
        entries.append(FactorEntry(part.rank, part.scale, hashes[left], hashes[right]))
    return tuple(entries)


def verify(path: str | Path) -> int:
    """Compare the bytes of a saved task vector with the hashes in its manifest; the number of tensors compared.

    Raises:
        CorruptFileError: A tensor is not what was written.
    """
    vector = TaskVector.open(path)
    stored = open_safetensors(shard_files(Path(path), STEM), path)
    expected = {held: digest for name, entry in vector.manifest.tensors.items() for held, (_, digest) in entry.stored(name).items()}
    found = hashes_of(stored, list(expected))
    wrong = [name for name, digest in expected.items() if found[name] != digest]
    if wrong:
        raise CorruptFileError(
            f"{path} is not what was written: other bytes in {first_three(wrong)}. Copy it again from where it was whole."
        )
    return len(expected)
