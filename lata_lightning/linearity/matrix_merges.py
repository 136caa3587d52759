"""The tensors of one vector that is made of several, each matrix from those of the vectors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.errors import CorruptFileError
from lata_lightning.layers import LayerMap
from lata_lightning.linearity.forms import Form, matrix_forms
from lata_lightning.numerics.chunks import ChunkReader, MemoryLimit, streamed, tensor_chunks
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.matrix_regression import Figures, Operand, Settings, regressed, regressed_factors, working_bytes
from lata_lightning.numerics.measure import all_finite
from lata_lightning.numerics.singular import iso_c, tsv_m
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Computed
from lata_lightning.vectors.provenance import OUTSIDE

MatrixMethod = Literal["regression", "tsv", "iso"]
MATRIX_METHODS: tuple[MatrixMethod, ...] = get_args(MatrixMethod)
INTERFERENCE = "interference"
"""‖(W − τ_t) τ_tᵀ‖ / ‖τ_t τ_tᵀ‖: the share of what a vector does on its own inputs that the merge changes."""
CONDITION = "condition"
NAMES: Mapping[MatrixMethod, str] = {"regression": "regression without samples", "tsv": "tsv", "iso": "iso"}
"""What the methods are called in records."""
_BY_SINGULAR_VECTORS: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {"tsv": tsv_m, "iso": iso_c}
_MEMORY = 4 << 30


@final
class MatrixMerge(Computed):
    """The merge of some vectors, of which each tensor is computed when it is read.

    Args:
        vectors: Under one set of names (names that a later one lacks are left out).
        labels: What the vectors are called, one for each.
        unchanged: For each vector the tensors that are known to be zero in it.
        layers: Where the tensors belong.
        method: ``regression``, ``tsv`` or ``iso``. The regression takes every matrix, the others those inside the blocks, as they were published; where
            there are no blocks, all. Everything else is the mean of the vectors that change it.
        settings: How matrices are solved, for the regression.
        memory: Bytes that matrices which are solved at the same time may take; a larger one is solved alone.

    Attributes:
        forms: By name, the tensors that are merged as matrices.
    """

    def __init__(
        self,
        vectors: Sequence[TensorSource],
        labels: Sequence[str],
        unchanged: Sequence[Collection[str]],
        layers: LayerMap,
        method: MatrixMethod = "regression",
        settings: Settings | None = None,
        memory: int = _MEMORY,
    ) -> None:
        origin = Origin(f"the {NAMES[method]} of {len(vectors)} vectors")
        super().__init__(vectors[-1], origin, dtype=torch.float32, parallel=all(vector.parallel for vector in vectors))
        self._vectors, self._labels, self._unchanged, self._layers = vectors, _distinct(labels), unchanged, layers
        self._method, self._settings = method, settings or Settings()
        self._memory = MemoryLimit(memory)
        self._low_rank: dict[str, LowRank] = {}
        self._figures: dict[str, Figures] = {}
        forms = matrix_forms({name: vectors[-1].shape(name) for name in self.names}, layers)
        everywhere = method == "regression" or not layers.blocks
        self.forms = {name: form for name, form in forms.items() if everywhere or layers.positions[name].block is not None}

    @override
    def read(self, name: str) -> Tensor:
        factors = self.low_rank(name)
        if factors is not None:
            return factors.dense()
        count = math.prod(self.shape(name))
        return self.chunks(name)(0, count).reshape(self.shape(name)).float()

    @override
    def chunks(self, name: str) -> ChunkReader:
        acting = self._acting(name)
        if not acting:
            return tensor_chunks(torch.zeros(self.shape(name)))
        if len(acting) == 1:
            return self._vectors[acting[0]].chunks(name)
        return streamed(self._blocks(name, acting), math.prod(self.shape(name)))

    @override
    def low_rank(self, name: str) -> LowRank | None:
        acting = self._acting(name)
        if len(acting) == 1:
            return self._vectors[acting[0]].low_rank(name)
        form = self.forms.get(name)
        if not acting or self._method != "regression" or form is None or form.count > 1:
            return None
        if name not in self._low_rank:
            held = [factors for number in acting if (factors := self._vectors[number].low_rank(name)) is not None]
            if len(held) < len(acting):
                return None
            figures = Figures.empty(len(acting))
            with self._checked(name, acting):
                solved = regressed_factors([_as_matrix(factors, form) for factors in held], form.shape, self._settings, figures)
            self._low_rank[name] = _as_stored(solved, form, self.shape(name))
            self._keep(name, acting, figures)
        return self._low_rank[name]

    @override
    def measured(self) -> Mapping[tuple[str, str | None], Mapping[str, float | None]]:
        """Interference of each vector and condition, by block and outside; of the tensors that have been read and that several vectors change."""
        layers: dict[str, list[str]] = {**self._layers.layers(), OUTSIDE: list(self._layers.outside())}
        known = {layer: [self._figures[name] for name in names if name in self._figures] for layer, names in layers.items()}
        known = {layer: figures for layer, figures in known.items() if figures}
        if not known:
            return {}
        found: dict[tuple[str, str | None], Mapping[str, float | None]] = {
            (INTERFERENCE, label): {layer: interference(figures)[number] for layer, figures in known.items()}
            for number, label in enumerate(self._labels)
        }
        found[CONDITION, None] = {layer: max(figures.condition for figures in several) for layer, several in known.items()}
        return found

    @override
    def by_tensor(self) -> Mapping[str, Mapping[str, Any]]:
        """Interference of each vector, in their order, and condition of the tensors that have been read and that several vectors change."""
        return {
            name: {INTERFERENCE: interference([self._figures[name]]), CONDITION: self._figures[name].condition}
            for name in self.names
            if name in self._figures
        }

    def _acting(self, name: str) -> list[int]:
        return [number for number, unchanged in enumerate(self._unchanged) if name not in unchanged]

    def _keep(self, name: str, acting: Sequence[int], figures: Figures) -> None:
        """Note the figures of some vectors as those of all; a matrix that fewer than two change has none."""
        if figures.condition == 0:
            return
        all_of_them = Figures.empty(len(self._vectors))
        all_of_them.condition = figures.condition
        for number, lost, own in zip(acting, figures.lost, figures.own, strict=True):
            all_of_them.lost[number], all_of_them.own[number] = lost, own
        self._figures[name] = all_of_them

    @contextmanager
    def _checked(self, name: str, acting: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except CorruptFileError as error:
            among = ", ".join(self._vectors[number].label for number in acting)
            raise CorruptFileError(f"{name}: {error} in one of {among}") from error

    def _blocks(self, name: str, acting: Sequence[int]) -> Iterator[Tensor]:
        """The tensor in blocks, each matrix solved when its first one is asked for."""
        form = self.forms.get(name)
        if form is None:
            yield self._mean(name, acting)
            return
        with self._checked(name, acting):
            if self._method == "regression":
                yield from self._regressed(name, acting, form)
            else:
                yield from self._by_singular_vectors(name, acting, form)

    def _mean(self, name: str, acting: Sequence[int]) -> Tensor:
        """The mean of the vectors that change a tensor."""
        held = [tensor for number in acting if bool((tensor := self._vectors[number].read(name)).any())]
        total = reduce(lambda one, other: one + other.double(), held, torch.zeros(self.shape(name), dtype=torch.float64))
        return (total / max(1, len(held))).float()

    def _regressed(self, name: str, acting: Sequence[int], form: Form) -> Iterator[Tensor]:
        figures = Figures.empty(len(acting))
        loads = [(self._vectors[number].chunks(name), self._vectors[number].chunks(name)) for number in acting]
        held = [self._vectors[number].low_rank(name) if form.count == 1 else None for number in acting]
        size = form.outputs * form.inputs
        for index in range(form.count):
            operands = [_operand(first, again, index * size, form, factors) for (first, again), factors in zip(loads, held, strict=True)]
            with self._memory.taken(working_bytes(operands, form.shape)):
                blocks = regressed(operands, form.shape, self._settings, figures)
                if form.turned:
                    yield torch.cat(list(blocks)).T.contiguous()
                else:
                    yield from blocks
        self._keep(name, acting, figures)

    def _by_singular_vectors(self, name: str, acting: Sequence[int], form: Form) -> Iterator[Tensor]:
        size = form.outputs * form.inputs
        loads = [self._vectors[number].chunks(name) for number in acting]
        # The stored order of axes serves as well: what comes out is transposed with what goes in.
        rows, columns = reversed(form.shape) if form.turned else form.shape
        for index in range(form.count):
            with self._memory.taken(8 * size * (3 * len(acting) + 3)):
                matrices = [load(index * size, (index + 1) * size).double().reshape(rows, columns) for load in loads]
                if not all(all_finite(matrix) for matrix in matrices):
                    raise CorruptFileError("NaN or infinite values")
                yield _BY_SINGULAR_VECTORS[self._method]([matrix.to(self._settings.device) for matrix in matrices]).float().cpu()


def interference(figures: Sequence[Figures]) -> list[float | None]:
    """For each vector the share of what it does on its own inputs that the merge changes, over some matrices together; None where it does nothing."""
    vectors = range(len(figures[0].own))
    sums = [(sum(found.lost[number] for found in figures), sum(found.own[number] for found in figures)) for number in vectors]
    return [math.sqrt(lost / own) if own else None for lost, own in sums]


def _operand(first: ChunkReader, again: ChunkReader, offset: int, form: Form, factors: LowRank | None) -> Operand:
    if form.turned:
        # Such models are small: a matrix is read whole and turned over.
        size = form.outputs * form.inputs
        matrix = first(offset, offset + size).reshape(form.inputs, form.outputs).T.contiguous()
        return Operand(tensor_chunks(matrix), tensor_chunks(matrix), None if factors is None else _as_matrix(factors, form))

    def moved(load: ChunkReader) -> ChunkReader:
        return lambda begin, end: load(offset + begin, offset + end)

    return Operand(moved(first), moved(again), None if factors is None else _as_matrix(factors, form))


def _as_matrix(factors: LowRank, form: Form) -> LowRank:
    """Factors of outputs × inputs."""
    if form.turned:
        return LowRank(form.shape, tuple(Factors(part.right.T, part.left.T, part.scale) for part in factors.parts))
    return LowRank(form.shape, factors.parts)


def _as_stored(factors: LowRank, form: Form, shape: tuple[int, ...]) -> LowRank:
    """Factors of the tensor as it is stored, in float32."""
    parts = [Factors(part.left.float(), part.right.float(), part.scale) for part in factors.parts]
    if form.turned:
        parts = [Factors(part.right.T.contiguous(), part.left.T.contiguous(), part.scale) for part in parts]
    return LowRank(shape, tuple(parts))


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels, numbered where one is there more than once."""
    return [label if labels.count(label) == 1 else f"{label} ({number + 1})" for number, label in enumerate(labels)]
