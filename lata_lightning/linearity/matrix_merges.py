"""Merging several vectors into one, matrix by matrix and without samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lata_lightning.errors import CorruptFileError
from lata_lightning.layers import LayerMap
from lata_lightning.linearity.forms import MatrixForm, matrix_forms
from lata_lightning.linearity.methods import MatrixMethod
from lata_lightning.numerics.chunks import ChunkReader, MemoryLimit, streamed, tensor_chunks
from lata_lightning.numerics.combine import mean
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.matrix_regression import Figures, Operand, Settings, regressed, regressed_factors, working_bytes
from lata_lightning.numerics.measure import all_finite
from lata_lightning.numerics.singular import iso_c, tsv_m
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Computed
from lata_lightning.vectors.provenance import OUTSIDE

INTERFERENCE = "interference"
"""‖(W − τ_t) τ_tᵀ‖ / ‖τ_t τ_tᵀ‖: how much the merge changes the effect of a vector on its own inputs, as a share of that effect."""
CONDITION = "condition"
NAMES: Mapping[MatrixMethod, str] = {"regression": "regression without samples", "tsv": "tsv", "iso": "iso"}
"""Names of the methods in records."""
_BY_SINGULAR_VECTORS: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {"tsv": tsv_m, "iso": iso_c}
_MEMORY = 4 << 30


@final
class MatrixMerge(Computed):
    """The merge of several vectors; each tensor is computed when it is read.

    Args:
        vectors: The vectors, under one set of names.
        labels: Names of the vectors.
        unchanged: For each vector the tensors that are known to be zero in it.
        layers: Layers of the tensors.
        method: ``regression``, ``tsv`` or ``iso``. The regression merges every matrix; the others, as published, only those inside the blocks, or all
            matrices where there are no blocks. Every other tensor is the mean of the vectors that change it.
        settings: How the regression solves matrices.
        memory: Largest number of bytes for matrices that are solved at the same time; a larger matrix is solved alone.

    Attributes:
        forms: Forms of the tensors that are merged as matrices, by name.
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
            matrices = [factors for number in acting if (factors := self._vectors[number].low_rank(name)) is not None]
            if len(matrices) < len(acting):
                return None
            figures = Figures.empty(len(acting))
            with self._checked(name, acting):
                solved = regressed_factors([_as_matrix(factors, form) for factors in matrices], form.shape, self._settings, figures)
            self._low_rank[name] = _as_stored(solved, form, self.shape(name))
            self._store_figures(name, acting, figures)
        return self._low_rank[name]

    @override
    def measured(self) -> Mapping[tuple[str, str | None], Mapping[str, float | None]]:
        """Return interference of each vector and condition, by block and outside, over the tensors that were read and that several vectors change."""
        layers: dict[str, list[str]] = {**self._layers.layers(), OUTSIDE: list(self._layers.outside())}
        known = {layer: [self._figures[name] for name in names if name in self._figures] for layer, names in layers.items()}
        known = {layer: figures for layer, figures in known.items() if figures}
        if not known:
            return {}
        by_measure: dict[tuple[str, str | None], Mapping[str, float | None]] = {
            (INTERFERENCE, label): {layer: interference(figures)[number] for layer, figures in known.items()}
            for number, label in enumerate(self._labels)
        }
        by_measure[CONDITION, None] = {layer: max(figures.condition for figures in several) for layer, several in known.items()}
        return by_measure

    @override
    def by_tensor(self) -> Mapping[str, Mapping[str, Any]]:
        """Return interference, in the order of the vectors, and condition of each tensor that was read and that several vectors change."""
        return {
            name: {INTERFERENCE: interference([self._figures[name]]), CONDITION: self._figures[name].condition}
            for name in self.names
            if name in self._figures
        }

    def _acting(self, name: str) -> list[int]:
        return [number for number, unchanged in enumerate(self._unchanged) if name not in unchanged]

    def _store_figures(self, name: str, acting: Sequence[int], figures: Figures) -> None:
        """Store the figures of the acting vectors among those of all; a matrix that fewer than two vectors change has none."""
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
        """Yield the tensor in blocks; each matrix is solved when its first block is needed."""
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
        """Return the mean of the vectors that change a tensor."""
        return mean((tensor for number in acting if bool((tensor := self._vectors[number].read(name)).any())), self.shape(name))

    def _regressed(self, name: str, acting: Sequence[int], form: MatrixForm) -> Iterator[Tensor]:
        figures = Figures.empty(len(acting))
        loads = [(self._vectors[number].chunks(name), self._vectors[number].chunks(name)) for number in acting]
        low_rank = [self._vectors[number].low_rank(name) if form.count == 1 else None for number in acting]
        size = form.outputs * form.inputs
        for index in range(form.count):
            operands = [
                _operand(first, again, index * size, form, factors) for (first, again), factors in zip(loads, low_rank, strict=True)
            ]
            with self._memory.taken(working_bytes(operands, form.shape)):
                blocks = regressed(operands, form.shape, self._settings, figures)
                if form.turned:
                    yield torch.cat(list(blocks)).T.contiguous()
                else:
                    yield from blocks
        self._store_figures(name, acting, figures)

    def _by_singular_vectors(self, name: str, acting: Sequence[int], form: MatrixForm) -> Iterator[Tensor]:
        size = form.outputs * form.inputs
        loads = [self._vectors[number].chunks(name) for number in acting]
        # The stored order of axes will do: the result is transposed if the inputs are.
        rows, columns = reversed(form.shape) if form.turned else form.shape
        for index in range(form.count):
            with self._memory.taken(8 * size * (3 * len(acting) + 3)):
                matrices = [load(index * size, (index + 1) * size).double().reshape(rows, columns) for load in loads]
                if not all(all_finite(matrix) for matrix in matrices):
                    raise CorruptFileError("NaN or infinite values")
                yield _BY_SINGULAR_VECTORS[self._method]([matrix.to(self._settings.device) for matrix in matrices]).float().cpu()


def interference(figures: Sequence[Figures]) -> list[float | None]:
    """Return, for each vector, the change of its effect on its own inputs as a share of that effect, over several matrices; None for a zero vector."""
    vectors = range(len(figures[0].own))
    sums = [(sum(each.lost[number] for each in figures), sum(each.own[number] for each in figures)) for number in vectors]
    return [math.sqrt(lost / own) if own else None for lost, own in sums]


def _operand(first: ChunkReader, again: ChunkReader, offset: int, form: MatrixForm, factors: LowRank | None) -> Operand:
    if form.turned:
        # Models with such matrices are small, so a matrix is read whole and transposed.
        size = form.outputs * form.inputs
        matrix = first(offset, offset + size).reshape(form.inputs, form.outputs).T.contiguous()
        return Operand(tensor_chunks(matrix), tensor_chunks(matrix), None if factors is None else _as_matrix(factors, form))

    def moved(load: ChunkReader) -> ChunkReader:
        return lambda begin, end: load(offset + begin, offset + end)

    return Operand(moved(first), moved(again), None if factors is None else _as_matrix(factors, form))


def _as_matrix(factors: LowRank, form: MatrixForm) -> LowRank:
    """Return factors of the matrix as outputs × inputs."""
    if form.turned:
        return LowRank(form.shape, tuple(Factors(part.right.T, part.left.T, part.scale) for part in factors.parts))
    return LowRank(form.shape, factors.parts)


def _as_stored(factors: LowRank, form: MatrixForm, shape: tuple[int, ...]) -> LowRank:
    """Return factors of the tensor in its stored orientation, in float32."""
    parts = [Factors(part.left.float(), part.right.float(), part.scale) for part in factors.parts]
    if form.turned:
        parts = [Factors(part.right.T.contiguous(), part.left.T.contiguous(), part.scale) for part in parts]
    return LowRank(shape, tuple(parts))


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return the labels, with a number after those that occur more than once."""
    return [label if labels.count(label) == 1 else f"{label} ({number + 1})" for number, label in enumerate(labels)]
