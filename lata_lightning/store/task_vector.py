"""The task vector: a lazy mapping from tensor name to difference, in memory or in its directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.alignment import Alignment, check_same_tensors
from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError, WeightingError, first_three
from lata_lightning.layers import LayerMap, LayerRule, Level, check_level, layer_map, skeleton
from lata_lightning.moments import Start, check_start
from lata_lightning.store.cards import vector_card
from lata_lightning.store.differences import Difference, LossMeter, Scaled, Stored
from lata_lightning.store.hashing import hash_stored
from lata_lightning.store.manifest import Identity, Kind, Manifest, TensorEntry, read_manifest
from lata_lightning.store.opening import open_source, shard_files
from lata_lightning.store.pairing import pair
from lata_lightning.store.sources import MANIFEST_NAME, SafetensorsSource, Source
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
            tuned: Where it ended; for an instruction vector, instruct.
            kind: ``"task"``, or ``"instruction"`` for instruct − base.
            start_kind: Whether ``start`` is the instruct model or the base model.
            layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).

        Returns:
            A vector over all floating tensors of the model. Tensors of integers are no weights; they must be equal on both sides.

        Raises:
            LayoutMismatchError: The two sides differ in names, shapes, vocabulary or integer tensors.
            SourceError, CorruptFileError: One side cannot be read.
        """
        start_source, tuned_source = pair(open_source(start), open_source(tuned))
        floating = [name for name in start_source.names if start_source.dtype(name).is_floating_point]
        for name in set(start_source.names) - set(floating):
            if not torch.equal(start_source.read(name), tuned_source.read(name)):
                raise LayoutMismatchError(f"{name} holds integers, which must be equal in {start_source.label} and {tuned_source.label}")
        structure = start if isinstance(start, nn.Module) else skeleton(start_source.config) if start_source.config else None
        places = layer_map(floating, structure=structure, rule=layers)
        manifest = Manifest(
            kind=kind,
            start=check_start("base" if kind == "instruction" else start_kind),
            layers=places,
            start_identity=Identity(start_source.location, start_source.revision),
            tuned_identity=Identity(tuned_source.location, tuned_source.revision),
        )
        return cls(Difference(start_source, tuned_source, floating), manifest)

    @classmethod
    def open(cls, path: str | Path) -> TaskVector:
        """A saved task vector; its tensors stay on disk until they are asked for.

        Raises:
            SourceError: The path is no task vector.
            CorruptFileError: A file is truncated, or is not what the manifest says.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        stored = SafetensorsSource(shard_files(directory, STEM))
        stored.location = str(path)
        expected = {name: entry for name, entry in manifest.tensors.items() if not entry.unchanged}
        wrong = set(stored.names) ^ set(expected)
        wrong |= {name for name in expected if name in stored.names and stored.shape(name) != expected[name].shape}
        if wrong:
            raise CorruptFileError(
                f"the tensors of {directory} are not those of its manifest; different are {first_three(wrong)}. Copy it again."
            )
        return cls(Stored(stored, manifest), manifest)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.manifest.layers.places:
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
        check_same_tensors(self, instruction_vector)
        manifest = replace(self.manifest, start="instruct", start_identity=instruction_vector.manifest.tuned_identity, tensors={})
        return TaskVector(Difference(instruction_vector.tensors, self.tensors, self, identify=False), manifest)

    def save(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> TaskVector:
        """Write the vector to a directory, one tensor in memory at a time, and return it opened from there.

        Args:
            path: A directory that does not exist yet. It appears complete or not at all.
            dtype: Precision to store: ``float32``, ``bfloat16`` or ``float16``. What a lower one costs is measured and recorded.
            max_shard_bytes: Bytes of tensors per file.
            progress: Called after each tensor with the bytes written so far and the bytes in all.

        Raises:
            OutputError: The path exists, or the disk is full.
            CorruptFileError: The difference is not finite, or does not fit the dtype.
            LataError: The dtype is unknown.
        """
        target, stored = Path(path), float_dtype(dtype)
        check_free(target)
        frozen = self.unchanged
        layout = {name: (stored, self.shape(name)) for name in self if name not in frozen}
        loss = LossMeter()
        size = layout_size(layout)
        with atomic_directory(target, size) as directory:
            with ShardWriter(directory, STEM, layout, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"}) as writer:
                for name in writer.order:
                    full = self[name]
                    lower = full.to(stored)
                    if not torch.isfinite(lower).all():
                        what = (
                            "holds NaN or infinite values"
                            if not torch.isfinite(full).all()
                            else f"does not fit {dtype}; use bfloat16 or float32"
                        )
                        raise CorruptFileError(f"{name} of {self.label} {what}")
                    if full.dtype != stored:
                        loss.add(full, lower)
                    writer.write(name, lower)
                    if progress is not None:
                        progress(writer.written, size)
            entries = {name: TensorEntry(self.shape(name), dtype, writer.hashes.get(name), unchanged=name in frozen) for name in self}
            manifest = replace(self.manifest, tensors=entries, precision_loss=loss.result(), **self._identities())
            write_json(directory / MANIFEST_NAME, manifest.to_json())
            (directory / "README.md").write_text(vector_card(manifest, target.name), "utf-8")
        return TaskVector.open(path)

    def _identities(self) -> dict[str, Any]:
        """Identities of both sides with the hashes that reading them has brought."""
        if not isinstance(self.tensors, Difference):
            return {}
        start, tuned = self.tensors.content_hashes()
        return {
            "start_identity": replace(self.manifest.start_identity, content_hash=self.manifest.start_identity.content_hash or start),
            "tuned_identity": replace(self.manifest.tuned_identity, content_hash=self.manifest.tuned_identity.content_hash or tuned),
        }


def verify(path: str | Path) -> int:
    """Compare the bytes of a saved task vector with the hashes in its manifest; the number of tensors compared.

    Raises:
        CorruptFileError: A tensor is not what was written.
    """
    vector = TaskVector.open(path)
    stored = SafetensorsSource(shard_files(Path(path), STEM))
    expected = {name: entry.hash for name, entry in vector.manifest.tensors.items() if not entry.unchanged}
    wrong = [name for name, digest in expected.items() if hash_stored(stored.read(name)) != digest]
    if wrong:
        raise CorruptFileError(
            f"{path} is not what was written: other bytes in {first_three(wrong)}. Copy it again from where it was whole."
        )
    return len(expected)
