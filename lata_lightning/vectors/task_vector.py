"""The task vector: a lazy mapping from tensor name to difference, in memory or in its directory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from pathlib import Path

from torch import Tensor, nn

from lata_lightning.alignment import Alignment
from lata_lightning.errors import LataError, WeightingError, first_three
from lata_lightning.layers import STATISTICS, DeferredLayerMap, LayerMap, LayerPosition, LayerRule, Level, check_level, layer_map
from lata_lightning.moments import Start, check_start
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.meaning import check_same_meaning, difference_meaning
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.opening import narrowed, open_difference, open_source
from lata_lightning.store.pairing import brought_to, check_same_shapes, match, measured_names
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.tied_names import ties_by_alias, ties_of
from lata_lightning.store.views import Scaled, View
from lata_lightning.store.writer import MAX_SHARD_BYTES, Progress
from lata_lightning.vectors.artefact import derivation_of, open_stored, save_vector
from lata_lightning.vectors.differences import Difference
from lata_lightning.vectors.entries import TensorEntry
from lata_lightning.vectors.manifest import Derivation, Identity, Kind, Manifest
from lata_lightning.weighting import CLOSED_FORM, DEFAULT_THRESHOLD, ORIGINS, Rule, Weighting, is_own_name, rule_name
from lata_lightning.weighting import coefficients as by_rule


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
        start: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource,
        tuned: str | Path | nn.Module | Mapping[str, Tensor] | TensorSource,
        *,
        kind: Kind = "task",
        start_kind: Start = "instruct",
        layers: LayerRule | str | None = None,
        check_config: bool = True,
        leave_out: Sequence[str] | LeaveOut = (),
        model: str | None = None,
    ) -> TaskVector:
        """The difference of two sets of weights; nothing is read before a tensor is asked for.

        Args:
            start: Where the fine-tune started: directory, ``.ckpt``, hub id, module or state dict. For an instruction vector, base.
            tuned: Where it ended; for an instruction vector, instruct. May be a peft adapter directory with LoRA trained on ``start``: the vector
                then is what the adapter adds, held as its factors.
            kind: ``"task"``, or ``"instruction"`` for instruct − base.
            start_kind: Whether ``start`` is the instruct model or the base model.
            layers: Rule that names the blocks, for modules of no known layout (see ``layer_map``).
            check_config: Refuse sides, and later uses of the vector, whose configs say that equal weights compute another function.
            leave_out: Regular expressions, searched in tensor names: what matches is no part of the vector, as heads of different tasks. Each must match
                something, unless they come as a ``LeaveOut``.
            model: Name of the module that is meant, where a side holds several, such as actor and reference.

        Returns:
            A vector over all weights of the model that both sides hold, and over its buffers, such as running statistics (``layers.statistics``). Tables
            that the model computes by itself are no part of it. Tensors of integers are none either; they must be equal on both sides, unless they
            count batches. What lies outside of a prefix that one side has alone is left out and recorded (``manifest.leave_out``).

        Raises:
            LataError: A pattern of what to leave out is no regular expression, or matches nothing.
            LayoutMismatchError: The two sides differ in names, shapes, integer tensors, tokens, or in what their configs make of the weights.
            SourceError, CorruptFileError: One side cannot be read.
        """
        start, tuned = narrowed([start, tuned], model)
        start_source = open_source(start)
        added, aliases = open_difference(tuned, start_source), start_source.tied
        tuned_source: TensorSource
        difference: TensorSource
        left_out, given = (leave_out, NOTHING) if isinstance(leave_out, LeaveOut) else (LeaveOut(leave_out),) * 2
        statistics = frozenset[str]()
        alone: tuple[str, ...] = ()
        if added is not None:
            every, alone = (*added.names, *added.left_out), added.left_out
            given.check_used(every, added.label)
            kept = {name: name for name in added.names if not left_out(name)}
            tuned_source, unchanged = added, added.unchanged & kept.keys()
            difference = added if len(kept) == len(added.names) else View(added, kept)
        else:
            opened = open_source(tuned)
            every = (*start_source.names, *opened.names)
            given.check_used(every, f"{start_source.label} and {opened.label}")
            found = match(start_source, opened, left_out)
            check_same_shapes(found)
            modules = [side for side in (start, tuned) if isinstance(side, nn.Module)]
            names, statistics = measured_names(found, modules, start_source.config or opened.config)
            start_source, tuned_source, alone = found.start, found.tuned, found.left_out
            difference, unchanged = Difference(start_source, tuned_source, names), frozenset()

        meaning = difference_meaning(start_source, tuned_source, compared=check_config)

        def place() -> LayerMap:
            structure = start if isinstance(start, nn.Module) else meta_model(start_source.config)
            found = layer_map([name for name in difference.names if name not in statistics], structure=structure, rule=layers)
            buffers = dict.fromkeys(statistics, LayerPosition(None, STATISTICS))
            return LayerMap({name: {**found.positions, **buffers}[name] for name in difference.names}, found.blocks)

        # A rule is tried at once, as it may be wrong.
        places = place() if layers is not None else DeferredLayerMap(place, statistics)
        manifest = Manifest(
            kind=kind,
            start=check_start("base" if kind == "instruction" else start_kind),
            layers=places,
            start_identity=Identity(start_source.location, start_source.revision),
            tuned_identity=Identity(tuned_source.location, tuned_source.revision),
            meaning=meaning,
            tied=ties_of(start, difference.names) if isinstance(start, nn.Module) else ties_by_alias(aliases, difference.names),
            tensors={name: TensorEntry(difference.shape(name), "float32", unchanged=True) for name in unchanged},
            leave_out=(*left_out.used(every), *(f"^{re.escape(name)}$" for name in alone)),
        )
        return cls(difference, manifest)

    @classmethod
    def open(cls, path: str | Path, *, check_config: bool = True) -> TaskVector:
        """A saved task vector; its tensors stay on disk until they are asked for.

        Args:
            path: Its directory.
            check_config: As for ``between``.

        Raises:
            SourceError: The path is no task vector.
            CorruptFileError: A file is truncated, or is not what the manifest says.
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
        """LayerPosition of every tensor."""
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
        """The coefficient of the layer that holds a tensor; 1 as long as no rule has been applied, and for buffers."""
        if self.manifest.coefficients is None or name in self.layers.statistics:
            return 1.0
        layer = self.layers.layer_of(name, self.manifest.level)
        return self.manifest.outside if layer is None else self.manifest.coefficients[layer]

    def weighted(
        self,
        alignment: Alignment,
        weighting: Weighting | Rule,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        outside: float = 0.0,
        instruction_vector: TaskVector | None = None,
    ) -> TaskVector:
        """The same vector with coefficients that follow from an alignment.

        Args:
            alignment: What ``align`` measured on this vector.
            weighting: ``"linear"``, ``"log"``, ``"threshold"``, or ``"none"``, which gives 1 to every layer; or a function from the alignment
                to the coefficient by layer, which is recorded by its name.
            threshold: For ``"threshold"``.
            outside: Coefficient of embeddings, final norm, head and whatever else belongs to no layer; 1 with ``"none"``.
            instruction_vector: Recorded as what the alignment was measured with.

        Raises:
            WeightingError: The rule is unknown, or the layers cannot be ranked.
        """
        found = by_rule(alignment, weighting, threshold)
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
            weighting=rule_name(weighting),
            threshold=threshold,
            coefficients=found,
            alignment=alignment.with_coefficients(found, outside),
            instruction_identity=instruction,
            asked_for=True,
        )
        return TaskVector(self.tensors, manifest)

    def with_coefficients(
        self, coefficients: Mapping[str, float] | Rule, *, level: Level = "block", outside: float = 0.0, weighting: str | None = None
    ) -> TaskVector:
        """Return the same vector with coefficients of one's own.

        Args:
            coefficients: One finite number for each layer; or a function that makes them of the alignment that the vector stores.
            level: Unit of the layers.
            outside: Coefficient of the tensors that belong to no layer.
            weighting: Recorded as where they come from: a rule of the package, ``"closed-form"``, or a name of your own. By default the name of the
                function, and ``"closed-form"`` for numbers.

        Returns:
            A vector that keeps its alignment, if it has one, as what was measured.

        Raises:
            WeightingError: They cannot come from there, or the function needs an alignment by this level and none is stored.
            LataError: The layers are not those of this vector, or a number is not finite.
        """
        check_level(level)
        measured = self.manifest.alignment
        if not isinstance(coefficients, Mapping):
            if measured is None or measured.level != level:
                raise WeightingError(
                    f"{self.label} stores no alignment by {level} for the rule {rule_name(coefficients)!r}: "
                    "measure one with align(), and give both to weighted()"
                )
            weighting, coefficients = weighting or rule_name(coefficients), by_rule(measured, coefficients)
        weighting = weighting or CLOSED_FORM
        if weighting not in ORIGINS and not is_own_name(weighting):
            raise WeightingError(
                f"coefficients cannot come from {weighting!r}; choose one of {', '.join(ORIGINS)}, or a name of your own of letters, digits and _ . -"
            )
        layers = set(self.layers.layers(level))
        if set(coefficients) != layers:
            raise LataError(
                f"there must be one coefficient for each {level} of {self.label}; on one side only are {first_three(set(coefficients) ^ layers)}"
            )
        odd = [layer for layer, number in coefficients.items() if not isfinite(number)]
        if odd or not isfinite(outside):
            raise LataError(f"coefficients must be finite numbers; they are not in {first_three(odd or ['outside'])}")
        if measured is not None:
            measured = measured.with_coefficients(coefficients if measured.level == level else None, outside)
        manifest = replace(
            self.manifest,
            level=level,
            outside=outside,
            weighting=weighting,
            coefficients=dict(coefficients),
            alignment=measured,
            asked_for=True,
        )
        return TaskVector(self.tensors, manifest)

    def derivation(self) -> Derivation | None:
        """How the vector was made of others, with what was measured while its tensors were read; None if it was not."""
        return derivation_of(self.tensors, self.manifest)

    def leaving_out(self, leave_out: LeaveOut) -> TaskVector:
        """The same vector without the tensors that match; layers that lose all their tensors lose their coefficients too."""
        kept = [name for name in self if not leave_out(name)]
        if len(kept) == len(self):
            return self
        layers = LayerMap({name: self.layers.positions[name] for name in kept}, self.layers.blocks)
        left = layers.layers(self.manifest.level)
        given = self.manifest.coefficients
        manifest = replace(
            self.manifest,
            layers=layers,
            coefficients=None if given is None else {layer: given[layer] for layer in left},
            tensors={name: entry for name, entry in self.manifest.tensors.items() if name in set(kept)},
            leave_out=tuple(dict.fromkeys((*self.manifest.leave_out, *leave_out.used(self)))),
        )
        return TaskVector(View(self.tensors, {name: name for name in kept}), manifest)

    def unweighted(self) -> TaskVector:
        """The same vector without coefficients, as plain task arithmetic takes it."""
        return TaskVector(self.tensors, replace(self.manifest, coefficients=None, weighting="none", asked_for=True))

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
            LayoutMismatchError: The two do not hold the same tensors, or belong to models of other tokens or another function.
        """
        if self.start != "base":
            raise LataError(f"{self.label} started from instruct: there is no instruction vector in it to take off")
        along = brought_to(self.tensors, instruction_vector.tensors, LeaveOut(self.manifest.leave_out))
        check_same_meaning((self.label, self.manifest.meaning), (instruction_vector.label, instruction_vector.manifest.meaning))
        manifest = replace(self.manifest, start="instruct", start_identity=instruction_vector.manifest.tuned_identity, tensors={})
        return TaskVector(Difference(along, self.tensors, self, identify=False), manifest)

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
            path: A directory that does not exist yet, or is empty. It appears complete or not at all.
            dtype: Precision to store: ``float32``, ``bfloat16`` or ``float16``. What a lower one costs is measured and recorded.
            max_shard_bytes: Bytes of tensors per file.
            workers: Threads that write a tensor each; by default one for each processor, up to four. The result does not depend on it.
            progress: Called after each piece with the bytes written so far and the bytes in all.

        Raises:
            OutputError: The path exists, or the disk is full.
            CorruptFileError: The difference is not finite, or does not fit the dtype.
            LataError: The dtype is unknown.
        """
        save_vector(
            self.tensors, self.manifest, Path(path), dtype=dtype, max_shard_bytes=max_shard_bytes, workers=workers, progress=progress
        )
        saved = TaskVector.open(path)
        return TaskVector(saved.tensors, replace(saved.manifest, asked_for=self.manifest.asked_for))
