"""Running the start model over samples of several tasks, each with its own vector, and fitting every matrix to the inputs it gets.

Each embedding and linear layer outside the blocks waits as a block of its own. The weights and Gram matrices of one block at a time are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lata_lightning.errors import CorruptFileError, first_three
from lata_lightning.linearity.forward_pass import BlockwiseForward, WaitingCall, call, relative
from lata_lightning.linearity.matrices import GramRecorder, MatrixFit
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.linearity.padding import input_positions
from lata_lightning.linearity.samples import Batch
from lata_lightning.numerics.combine import mean
from lata_lightning.numerics.matrix_regression import Settings
from lata_lightning.numerics.measure import all_finite
from lata_lightning.store.meta_model import copy_without_weights
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Computed
from lata_lightning.store.writer import Progress


@final
class FittedVector(Computed):
    """Fitted matrices; every other tensor is the mean of the vectors that have it, which is computed when it is read.

    Args:
        vectors: The tensors of each vector; all use the same names.
        absent: For each vector the names of the tensors that it does not have.
        location: Name of this source.

    Attributes:
        fitted: The fitted tensors by name, float32.
    """

    def __init__(self, vectors: Sequence[TensorSource], absent: Sequence[Collection[str]], location: str) -> None:
        super().__init__(vectors[0], Origin(location), dtype=torch.float32, parallel=all(vector.parallel for vector in vectors))
        self._vectors, self._absent = vectors, absent
        self.fitted: dict[str, Tensor] = {}

    @override
    def read(self, name: str) -> Tensor:
        if name in self.fitted:
            return self.fitted[name]
        return mean((vector.read(name) for number, vector in enumerate(self._vectors) if self.has(number, name)), self.shape(name))

    def has(self, number: int, name: str) -> bool:
        """Return whether one of the vectors has a tensor."""
        return name not in self._absent[number]


class MatrixFitting:
    """A forward pass in which all batches wait at each block, and at each leaf module with a matrix outside the blocks, until its matrices are fitted.

    Args:
        start: The start model.
        source: Weights of the start model.
        vectors: The vectors, each with its name for messages.
        merged: Gets the fitted matrices.
        blocks: Names of the tensors of each block, by path.
        unchanged: Stored tensors that need no fit.
        samples: Batches by task.
        in_order: Whether the merged blocks run before the next block is fitted; otherwise those of each task's own vector.
    """

    def __init__(
        self,
        start: ModelWeights,
        source: TensorSource,
        vectors: Sequence[tuple[str, TensorSource]],
        merged: FittedVector,
        blocks: Mapping[str, Sequence[str]],
        unchanged: frozenset[str],
        samples: Sequence[Sequence[Batch]],
        *,
        in_order: bool,
    ) -> None:
        self._start, self._source, self._vectors, self._merged = start, source, vectors, merged
        self._blocks, self._in_order = blocks, in_order
        self._batches = [(task, batch) for task, batches in enumerate(samples) for batch in batches]
        # The tensors outside all waiting modules are in the model during the whole pass, and each task may need its own.
        self._models = [start] if in_order else [start, *(ModelWeights(copy_without_weights(start.module)) for _ in vectors[1:])]
        matrices = {name for name, parameter in start.module.named_parameters(remove_duplicate=False) if parameter.ndim == 2}
        self._names = {**blocks, **_leaves(start, blocks, matrices)}
        moved, self._stored = set(merged.names) - unchanged, start.stored_names(matrices)
        self._pending = {
            path: unfitted
            for path, names in self._names.items()
            if (unfitted := {name for name in names if moved & self._stored.get(name, set())})
        }
        self._unread = {path: sum(math.prod(start.shape(name)) for name in names) * 4 for path, names in self._names.items()}
        self._size = sum(self._unread.values())
        self._outputs: dict[int, Any] = {}
        self._loaded: tuple[tuple[str, int], dict[str, Tensor]] | None = None
        inside = {name for names in self._names.values() for name in names}
        outside = [name for name in start.names if name not in inside]
        for task, model in enumerate(self._models):
            model.put(self._weights(outside, task))
        self._forward = BlockwiseForward([model.module for model in self._models], self._names, self._output)

    def fit(self, *, off_diagonal: float, settings: Settings, progress: Progress | None) -> None:
        """Run the samples until every matrix they reach is fitted.

        Args:
            off_diagonal: Factor of the entries of the Gram matrices off the diagonal.
            settings: How matrices are solved.
            progress: Called after each block is read, with the bytes read so far and the bytes in all.
        """

        def at_barrier(path: str) -> None:
            self._loaded = None
            if progress is not None and self._unread.pop(path, 0):
                progress(self._size - sum(self._unread.values()), self._size)
            if path in self._pending:
                self._fit(path, off_diagonal, settings)
            if not self._pending:
                raise _FinishedError

        try:
            self._forward.run([partial(self._run, task, batch) for task, batch in self._batches], at_barrier)
        except _FinishedError:
            pass
        finally:
            self._loaded = None

    def _run(self, task: int, batch: Batch) -> None:
        call(self._model(task), batch)

    def _output(self, waiting: WaitingCall) -> Any:
        """Return the output with which a batch continues."""
        if waiting.number in self._outputs:
            return self._outputs.pop(waiting.number)
        task = self._batches[waiting.number][0]
        key = (waiting.path, 0 if self._in_order else task)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, self._weights(self._names[waiting.path], task))
        return self._evaluate(waiting, task, self._loaded[1])

    def _fit(self, path: str, off_diagonal: float, settings: Settings) -> None:
        """Fit the matrices of a block to the inputs that they get with the weights of each task."""
        start = self._start.read(self._names[path], self._source)
        fits: dict[str, MatrixFit] = {}
        reached = [self._add_task(path, task, start, fits, off_diagonal) for task in range(len(self._vectors))]
        del start
        for task, (_, vector) in enumerate(self._vectors):
            for name in self._changed_by(task, fits.keys() - reached[task]):
                fits[name].add(self._start.read([name], vector)[name], None)
        # Each is freed before the next is solved.
        solved = {name: fits.pop(name).solve(settings) for name in list(fits)}
        known = set(self._merged.names)
        self._merged.fitted |= {name: tensor for name, tensor in self._start.stored(solved).items() if name in known}
        done = {other for name in solved for other in self._start.tied(name)}
        del self._pending[path]
        self._pending = {other: left for other, matrices in self._pending.items() if (left := matrices - done)}

    def _add_task(self, path: str, task: int, start: Mapping[str, Tensor], fits: dict[str, MatrixFit], off_diagonal: float) -> set[str]:
        """Add a task to the fits of a block, and return the names of the matrices that its samples reach."""
        label, vector = self._vectors[task]
        delta = self._start.read(self._names[path], vector)
        odd = [name for name in start if not all_finite(delta[name])]
        if odd:
            raise CorruptFileError(f"{label} holds NaN or infinite values in {first_three(odd)}")
        grams = self._record(path, task, {name: tensor + delta[name] for name, tensor in start.items()}).grams
        for name in self._changed_by(task, grams):
            gram = grams[name]
            average = gram.mean(off_diagonal)
            if not average.isfinite().all():
                raise CorruptFileError(f"NaN or infinite hidden states in {path}, from the weights of the start or of {label}")
            if name not in fits:
                fits[name] = MatrixFit(gram.role, delta[name].shape)
            fits[name].add(delta[name], average)
        return set(grams)

    def _changed_by(self, task: int, names: Iterable[str]) -> list[str]:
        """Return those matrices of which the vector of a task has any stored tensor."""
        return [name for name in names if any(self._merged.has(task, stored) for stored in self._stored[name])]

    def _record(self, path: str, task: int, weights: Mapping[str, Tensor]) -> GramRecorder:
        """Record the Gram matrices of a block over the waiting batches of a task."""
        recorder = GramRecorder({name: weights[name] for name in self._pending[path]})
        for number, waiting in sorted(self._forward.waiting.items()):
            if waiting.path != path or self._batches[number][0] != task:
                continue
            recorder.positions = partial(input_positions, path, self._batches[number][1])
            with recorder:
                output = self._evaluate(waiting, task, weights)
            # The output of a head would be far larger than its input, so only those of blocks are stored.
            if not self._in_order and path in self._blocks:
                self._outputs[number] = output
        return recorder

    def _evaluate(self, waiting: WaitingCall, task: int, weights: Mapping[str, Tensor]) -> Any:
        module = self._model(task).get_submodule(waiting.path)
        with torch.no_grad():
            return functional_call(module, relative(weights, waiting.path), waiting.args, waiting.kwargs)

    def _model(self, task: int) -> nn.Module:
        return self._models[0 if self._in_order else task].module

    def _weights(self, names: Sequence[str], task: int) -> dict[str, Tensor]:
        """Return the weights with which a batch continues: the merged ones, or those of its task if not in order."""
        delta = self._start.read(names, self._merged if self._in_order else self._vectors[task][1])
        return {name: tensor + delta[name] for name, tensor in self._start.read(names, self._source).items()}


class _FinishedError(Exception):
    """Ends the forward pass when every matrix is fitted; logits, for example, are not needed."""


def _leaves(model: ModelWeights, blocks: Mapping[str, Sequence[str]], matrices: Collection[str]) -> dict[str, list[str]]:
    """Return, by path, the names of the tensors of every leaf module outside the blocks that has a matrix."""
    leaves = {}
    for path, module in model.module.named_modules():
        inside = any(f"{path}.".startswith(f"{block}.") for block in blocks)
        names = [] if inside or next(module.children(), None) is not None else [name for name in model.names if name.startswith(f"{path}.")]
        if any(name in matrices for name in names):
            leaves[path] = names
    return leaves
