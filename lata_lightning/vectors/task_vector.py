"""The task vector: a lazy mapping from tensor name to difference, in memory or in its directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError
from lata_lightning.layers import LayerMap, LayerRule, Level
from lata_lightning.moments import Start
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.meaning import check_same_meaning
from lata_lightning.store.names import LeaveOut
from lata_lightning.store.opening import Weights
from lata_lightning.store.pairing import brought_to
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.views import Scaled, View
from lata_lightning.store.writer import MAX_SHARD_BYTES, Progress
from lata_lightning.vectors.artefact import derivation_of, open_stored, save_vector
from lata_lightning.vectors.coefficients import as_given, by_alignment, of_tensor
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.extraction import difference_between
from lata_lightning.vectors.manifest import Kind, Manifest
from lata_lightning.vectors.provenance import Derivation
from lata_lightning.weighting import DEFAULT_THRESHOLD, Rule, Weighting


class TaskVector(Mapping[str, Tensor]):
    """Tuned minus start, tensor by tensor, each computed or read when it is asked for.

    ``TaskVector.between(start, tuned)`` makes one from two sets of weights, ``TaskVector.open(path)`` reads a saved one. A vector
    behaves as a mapping from tensor name to a tensor on the CPU (float32, or float64 where the weights are), in the order of the
    model's file, and never changes: ``weighted``, ``pure`` and ``without`` return new ones that share the same tensors.

    Attributes:
        tensors: The source the differences come from.
        manifest: Everything known about them.
    """

    def __init__(self, tensors: TensorSource, manifest: Manifest) -> None:
        self.tensors = tensors
        self.manifest = manifest

    @classmethod
    def between(
        cls,
        start: Weights,
        tuned: Weights,
        *,
        kind: Kind = "task",
        start_kind: Start = "instruct",
        layers: LayerRule | str | None = None,
        check_config: bool = True,
        leave_out: Sequence[str] | LeaveOut = (),
        model: str | None = None,
    ) -> TaskVector:
        """Return the difference of two sets of weights; no weights are read before a tensor is asked for.

        Args:
            start: Where the fine-tune started: directory, ``.ckpt``, hub id, module or state dict. For an instruction vector, base.
            tuned: Where it ended; for an instruction vector, instruct. May be a peft adapter directory with LoRA trained on ``start``: the vector
                is then what the adapter adds, as its factors.
            kind: ``"task"``, or ``"instruction"`` for instruct − base.
            start_kind: Whether ``start`` is the instruct model or the base model.
            layers: Rule that names the blocks of a module whose layout is not recognised (see ``layer_map``).
            check_config: Refuse sides whose configs let equal weights compute different functions, and later uses of the vector with such models.
            leave_out: Regular expressions, searched in tensor names: matching tensors are left out, such as heads of different tasks. Each must
                match something, unless they come as a ``LeaveOut``.
            model: Name of the module to take, where a side has several, such as actor and reference.

        Returns:
            A vector over all weights that both sides have, and over buffers such as running statistics (``layers.statistics``). It has no tables that the
            model computes by itself, and no integer tensors; those must be equal on both sides, unless they count batches. Where one side has a
            prefix that the other lacks, what is outside of that prefix is left out and recorded (``manifest.leave_out``).

        Raises:
            LataError: A pattern of what to leave out is no regular expression, or matches nothing.
            LayoutMismatchError: The two sides differ in names, shapes, integer tensors, tokens, or in what their configs make of the weights.
            SourceError, CorruptFileError: One side cannot be read.
        """
        tensors, manifest = difference_between(
            start, tuned, kind=kind, start_kind=start_kind, layers=layers, check_config=check_config, leave_out=leave_out, model=model
        )
        return cls(tensors, manifest)

    @classmethod
    def open(cls, path: str | Path, *, check_config: bool = True) -> TaskVector:
        """Return a saved task vector; its tensors stay on disk until they are asked for.

        Args:
            path: Its directory.
            check_config: As for ``between``.

        Raises:
            SourceError: The path is no task vector.
            CorruptFileError: A file is truncated, or does not match the manifest.
        """
        tensors, manifest = open_stored(path)
        return cls(tensors, replace(manifest, meaning=replace(manifest.meaning, compared=check_config)))

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
        """Return the shape of a tensor, without reading it."""
        return self.tensors.shape(name)

    def read_slice(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:
        """Return a part of a tensor; all of it for None. Of a saved vector, whole rows are read without the rest."""
        return self.tensors.read_slice(name, slices)

    def low_rank(self, name: str) -> LowRank | None:
        """Return a tensor as factors, if the vector has it as factors, as that of a LoRA run does; None otherwise."""
        return self.tensors.low_rank(name)

    def factors_or_dense(self, name: str) -> Tensor | LowRank:
        """Return a tensor as factors if the vector has it as factors, else as it is, for sums that do not need the dense tensor."""
        factors = self.low_rank(name)
        return self[name] if factors is None else factors

    @property
    def label(self) -> str:
        """Short name for messages: its path, or its tuned and start side."""
        return self.tensors.label

    @property
    def layers(self) -> LayerMap:
        """Block and part of every tensor."""
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
        """Names of the tensors that are known to be zero without reading them."""
        return frozenset(name for name, entry in self.manifest.tensors.items() if entry.unchanged)

    def coefficient_of(self, name: str) -> float:
        """Return the coefficient of the layer of a tensor; 1 as long as no rule has been applied, and for buffers."""
        return of_tensor(self.manifest, name)

    def weighted(
        self,
        alignment: Alignment,
        weighting: Weighting | Rule,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        instruction_vector: TaskVector | None = None,
    ) -> TaskVector:
        """Return the same vector with the coefficients that a rule makes of an alignment.

        Args:
            alignment: What ``align`` measured on this vector.
            weighting: ``"linear"``, ``"log"``, ``"threshold"``, or ``"none"``, which gives 1 to every layer; or a function from the alignment
                to the coefficient by layer, which is recorded by its name.
            threshold: For ``"threshold"``.
            outside: Coefficient of embeddings, final norm, head and whatever else belongs to no layer; 1 with ``"none"``.
            instruction_vector: The vector that the alignment was measured with, for the record.

        Raises:
            WeightingError: The rule is unknown, or the layers cannot be ranked.
        """
        manifest = by_alignment(self.manifest, alignment, weighting, threshold, outside)
        sides = None if instruction_vector is None else instruction_vector.manifest
        identity = None if sides is None else (sides.start_identity, sides.tuned_identity)
        return TaskVector(self.tensors, replace(manifest, instruction_identity=identity))

    def with_coefficients(
        self, coefficients: Mapping[str, float] | Rule, *, level: Level = "block", outside: float = 0.0, weighting: str | None = None
    ) -> TaskVector:
        """Return the same vector with coefficients of one's own.

        Args:
            coefficients: One finite number for each layer; or a function that computes them from the alignment that the vector stores.
            level: Unit of the layers.
            outside: Coefficient of the tensors that belong to no layer.
            weighting: What is recorded as their origin: a rule of the package, ``"closed-form"``, or a name of your own. By default the name of the
                function, and ``"closed-form"`` for numbers.

        Returns:
            A vector that keeps the alignment that was measured, if there is one.

        Raises:
            WeightingError: The name is not allowed, or the function needs an alignment by this level and none is stored.
            LataError: The layers are not those of this vector, or a number is not finite.
        """
        return TaskVector(self.tensors, as_given(self.manifest, self.label, coefficients, level, outside, weighting))

    def derivation(self) -> Derivation | None:
        """Return how the vector was made from others, with what was measured while its tensors were read; None if it was not made from others."""
        return derivation_of(self.tensors, self.manifest)

    def leaving_out(self, leave_out: LeaveOut) -> TaskVector:
        """Return the same vector without the tensors that match; layers that lose all their tensors lose their coefficients too."""
        remaining = [name for name in self if not leave_out(name)]
        if len(remaining) == len(self):
            return self
        layers = LayerMap({name: self.layers.positions[name] for name in remaining}, self.layers.blocks)
        left = layers.layers(self.manifest.level)
        given = self.manifest.coefficients
        manifest = replace(
            self.manifest,
            layers=layers,
            coefficients=None if given is None else {layer: given[layer] for layer in left},
            tensors={name: entry for name, entry in self.manifest.tensors.items() if name in set(remaining)},
            leave_out=tuple(dict.fromkeys((*self.manifest.leave_out, *leave_out.used(self)))),
        )
        return TaskVector(View(self.tensors, {name: name for name in remaining}), manifest)

    def unweighted(self) -> TaskVector:
        """Return the same vector without coefficients, for plain task arithmetic."""
        return TaskVector(self.tensors, replace(self.manifest, coefficients=None, weighting="none", asked_for=True))

    def pure(self) -> TaskVector:
        """Return the pure vector: each layer times its coefficient.

        Raises:
            LataError: No coefficients are stored, or the vector started from base (see ``without``).
        """
        if self.manifest.coefficients is None:
            raise LataError(f"{self.label} has no coefficients: measure its alignment and apply a weighting first")
        if self.start == "base":
            raise LataError(
                f"{self.label} started from base, so it contains the instruction vector: subtract it first with without(instruction_vector)"
            )
        frozen = {name: entry for name, entry in self.manifest.tensors.items() if entry.unchanged}
        return TaskVector(
            Scaled(self.tensors, self.coefficient_of, f"the pure vector of {self.label}"),
            replace(self.manifest, coefficients=None, weighting="none", alignment=None, tensors=frozen),
        )

    def without(self, instruction_vector: TaskVector) -> TaskVector:
        """Return complex vector minus instruction vector, for a vector that started from base.

        Coefficients stay; the result starts from instruct.

        Raises:
            LataError: The vector did not start from base.
            LayoutMismatchError: The two do not have the same tensors, or belong to models with different tokens or functions.
        """
        if self.start != "base":
            raise LataError(f"{self.label} started from instruct: there is no instruction vector in it to subtract")
        renamed = brought_to(self.tensors, instruction_vector.tensors, LeaveOut(self.manifest.leave_out))
        check_same_meaning((self.label, self.manifest.meaning), (instruction_vector.label, instruction_vector.manifest.meaning))
        manifest = replace(self.manifest, start="instruct", start_identity=instruction_vector.manifest.tuned_identity, tensors={})
        return TaskVector(Difference(renamed, self.tensors, self, identify=False), manifest)

    def save(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> TaskVector:
        """Write the vector to a directory, chunk by chunk, and return it opened from there.

        Args:
            path: A directory that does not exist yet, or is empty. It appears complete or not at all.
            dtype: Precision to store: ``float32``, ``bfloat16`` or ``float16``. What a lower one costs is measured and recorded.
            max_shard_bytes: Bytes of tensors per file.
            workers: Threads that write a tensor each; by default one for each processor, up to four. The result does not depend on it.
            progress: Called after each chunk with the bytes written so far and the bytes in all.

        Raises:
            OutputError: The path holds something, or the disk is full.
            CorruptFileError: The difference is not finite, or does not fit the dtype.
            LataError: The dtype is unknown.
        """
        save_vector(
            self.tensors, self.manifest, Path(path), dtype=dtype, max_shard_bytes=max_shard_bytes, workers=workers, progress=progress
        )
        saved = TaskVector.open(path)
        return TaskVector(saved.tensors, replace(saved.manifest, asked_for=self.manifest.asked_for))
