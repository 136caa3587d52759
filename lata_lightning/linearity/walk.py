"""Running the start model over samples block by block, and every module of it again with weights moved along a task vector.

A block has weights only while all samples go through it: the start's own, and its differences in every vector. Weights, sums and hidden states stay
in float32 on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lata_lightning.errors import LataError, first_three
from lata_lightning.linearity.lockstep import Stand, in_lockstep
from lata_lightning.linearity.start import StartModel, open_start
from lata_lightning.linearity.units import Blocks, Unit
from lata_lightning.store.sources import TensorSource
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.task_vector import TaskVector

Batch = Mapping[str, Tensor]


class Passage:
    """One run of a module of the start model on one batch, which can be repeated with other weights.

    Attributes:
        unit: The layer.
        batch: Number of the batch.
        entered: What the module took in, of shape (positions, width); None if it is no sequence of hidden states.
        left: What it gave out, of shape (positions, width). Padding is in neither.
    """

    def __init__(self, walker: Walker, unit: Unit, batch: int, call: tuple[nn.Module, Any, Any, Any]) -> None:
        self.unit, self.batch = unit, batch
        self._walker = walker
        self._module, self._args, self._kwargs, output = call
        self.left = self._positions(output)
        entering = _first_tensor((*self._args, *self._kwargs.values()))
        whole = _first_tensor(output)
        self.entered = self._positions(entering) if entering is not None and whole is not None and entering.shape == whole.shape else None

    def with_weights(self, vector: int, scale: float, tensors: Iterable[str] | None = None) -> Tensor:
        """What the module gives out for the same input with weights start + scale · vector, of shape (positions, width).

        Args:
            vector: Number of the vector.
            scale: Dimensionless.
            tensors: Those of its tensors that are moved; by default those of the unit.
        """
        moved = set(self.unit.tensors if tensors is None else tensors)
        return self._positions(self._walker.evaluate(self.unit.module, self._args, self._kwargs, vector, scale, moved))

    def _positions(self, output: Any) -> Tensor:
        hidden = _first_tensor(output)
        if hidden is None:
            raise LataError(f"{self.unit.module} gives out no tensor, so that its outputs cannot be compared")
        return self._walker.without_padding(hidden, self.batch, self.unit.module)


class Walker:
    """The start model and some task vectors, and samples to run them on.

    Args:
        start: Directory or hub id of a transformers model, or a module (which is not changed).
        vectors: Task vectors from this start; coefficients they may have do not count.
        batches: Inputs of the model by argument name, batch by batch. Positions where ``attention_mask`` (in a decoder of an encoder-decoder
            model, ``decoder_attention_mask``) is 0 are padding.
        check_base: Refuse vectors that are known to start from different weights.

    Attributes:
        shell: The start model, without weights of the blocks.
        blocks: Its blocks.
        source: The floating weights of the start, under the names under which transformers saves it.
        layers: Position of every tensor, under the same names.
        units: Function from a level to the layers that are run by themselves (see ``Blocks.units``).

    Raises:
        SourceError: The start cannot be read, or does not say which model it is.
        LayoutMismatchError: A vector does not hold the tensors of the model, or belongs to one of other tokens or of another function.
        BaseMismatchError: Two vectors start from different weights.
        WeightingError: No tensor belongs to a block.
        LataError: There is no vector, or one started from base.
    """

    def __init__(self, start: StartModel, vectors: Sequence[TaskVector], batches: Sequence[Batch], *, check_base: bool = True) -> None:
        opened = open_start(start, vectors, check_base=check_base)
        self.shell, self.source, self._vectors, self.layers = opened.shell, opened.weights, opened.vectors, opened.layers
        self._batches = batches
        self.blocks = Blocks(self.shell, self.layers)
        self.units, self._inside = self.blocks.units, self.blocks.tensors
        self._body: nn.Module = getattr(self.shell.model, "base_model", self.shell.model)
        state = self.shell.model.state_dict(keep_vars=True)
        needed = {id(tensor) for tensor in self._body.state_dict(keep_vars=True).values()}
        within = {name for names in self._inside.values() for name in names}
        self._outside = [name for name in self.shell.names if name not in within and id(state[name]) in needed]
        self._bytes = {path: sum(state[name].numel() for name in names) * 4 for path, names in self._inside.items()}
        self._units: dict[str, list[Unit]] = {}
        self._now = _Now()
        self._equip()

    def walk(
        self,
        units: Sequence[Unit] = (),
        visit: Callable[[Passage], None] | None = None,
        *,
        vector: int = 0,
        scale: float = 0.0,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Run the model over all batches, all of them through one block before any goes on to the next.

        Args:
            units: The layers to visit, while the model itself has the weights of the start.
            visit: Called for each unit each time its module has run.
            vector: Number of the vector to move the weights along.
            scale: How far: the model runs with start + scale · vector.
            progress: Called after each block is read, with the bytes read so far and the bytes in all.

        Returns:
            What the model (without a head, for transformers models that have a body of their own) gives out, by batch: of shape
            (positions, width), without padding.

        Raises:
            LataError: The batches never reach a layer.
        """
        self._now = _Now(vector, scale, visit)
        self._units = {}
        for unit in units:
            self._units.setdefault(unit.module, []).append(unit)
        self.shell.put(self._moved(self._fill(self._outside, self.source), self._outside, vector, scale))
        reached: set[str] = set()

        def load(path: str) -> None:
            self._load(path, with_vectors=visit is not None)
            reached.add(path)
            if progress is not None:
                progress(sum(self._bytes[block] for block in reached), sum(self._bytes.values()))

        try:
            results = in_lockstep([partial(self._run, number) for number in range(len(self._batches))], load)
        finally:
            self._now.weights, self._now.deltas = {}, []
        missed = set(self._inside) - reached if units else set()
        missed |= {unit.module for unit in units} - self._now.visited
        if missed:
            raise LataError(
                f"the samples must run through every layer; never run are {first_three(missed)}. Does the model need further inputs?"
            )
        return results

    def evaluate(self, module: str, args: Any, kwargs: Any, vector: int, scale: float, moved: set[str]) -> Any:
        """Output of a module of the loaded block with some of its tensors moved."""
        held = {name: tensor for name, tensor in self._now.weights.items() if name.startswith(module + ".")}
        deltas = self._now.deltas[vector]
        values = {name: tensor + scale * deltas[name] if name in moved else tensor for name, tensor in held.items()}
        return functional_call(self.shell.model.get_submodule(module), relative(values, module), args, kwargs)

    def without_padding(self, hidden: Tensor, batch: int, module: str) -> Tensor:
        """Hidden states of a batch as (positions, width), without padding.

        Raises:
            LataError: There is padding, and the hidden states do not come as (rows, positions, width).
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        mask = self._mask(batch, module)
        if mask is None:
            return flat
        if hidden.shape[:-1] not in (mask.shape, (mask.numel(),)):
            raise LataError(
                f"{module} gives out hidden states of shape {tuple(hidden.shape)}, in which the padding of a batch of shape {tuple(mask.shape)} cannot be "
                "found. Give batches without padding."
            )
        return flat[mask.reshape(-1)]

    def _mask(self, batch: int, module: str) -> Tensor | None:
        """Which positions are no padding; None if all are."""
        inputs = self._batches[batch]
        decoding = "decoder_input_ids" in inputs and "decoder" in module.split(".")
        mask = inputs.get("decoder_attention_mask" if decoding else "attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def _run(self, batch: int, stand: Stand) -> Tensor:
        self._now.stand[batch] = stand
        self._now.batch = batch
        hidden = _first_tensor(call(self._body, self._batches[batch]))
        if hidden is None:
            raise LataError(f"{type(self._body).__name__} gives out no tensor")
        return self.without_padding(hidden, batch, list(self._inside)[-1])

    def _equip(self) -> None:
        """Let every block wait for its weights, and tell of every module that has run."""
        for path in self._inside:
            block = self.shell.model.get_submodule(path)
            block.forward = self._waiting(path, block.forward)
            for name, module in block.named_modules(prefix=path):
                module.register_forward_hook(partial(self._has_run, name), with_kwargs=True)

    def _waiting(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def wait(*args: Any, **kwargs: Any) -> Any:
            if self._now.inside:
                return forward(*args, **kwargs)
            batch = self._now.batch
            return self._now.stand[batch](path, partial(self._run_block, path, batch, args, kwargs))

        return wait

    def _run_block(self, path: str, batch: int, args: Any, kwargs: Any) -> Any:
        # Others have run since the batch came here.
        self._now.batch, self._now.inside = batch, True
        try:
            with torch.no_grad():
                return functional_call(self.shell.model.get_submodule(path), relative(self._now.weights, path), args, kwargs)
        finally:
            self._now.inside = False

    def _has_run(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        now = self._now
        if not now.inside or now.visiting or now.visit is None or path not in self._units:
            return
        now.visiting = True
        now.visited.add(path)
        try:
            for unit in self._units[path]:
                now.visit(Passage(self, unit, now.batch, (module, args, kwargs, output)))
        finally:
            now.visiting = False

    def _load(self, path: str, *, with_vectors: bool) -> None:
        names = self._inside[path]
        # Emptied before the next block is read, as there would be two in memory otherwise.
        self._now.weights, self._now.deltas = {}, []
        start = self._fill(names, self.source)
        self._now.weights = self._moved(start, names, self._now.vector, self._now.scale)
        if with_vectors:
            self._now.deltas = [self._fill(names, vector) for vector in self._vectors]

    def _moved(self, start: dict[str, Tensor], names: Sequence[str], vector: int, scale: float) -> dict[str, Tensor]:
        if scale == 0:
            return start
        deltas = self._fill(names, self._vectors[vector])
        return {name: tensor + scale * deltas[name] for name, tensor in start.items()}

    def _fill(self, names: Sequence[str], source: TensorSource) -> dict[str, Tensor]:
        held = set(source.names)
        return self.shell.fill(names, lambda name: source.read(name) if name in held else None, source.label)


class _Now:
    """What is going on in a walk; only one batch runs at a time."""

    def __init__(self, vector: int = 0, scale: float = 0.0, visit: Callable[[Passage], None] | None = None) -> None:
        self.vector, self.scale, self.visit = vector, scale, visit
        self.weights: dict[str, Tensor] = {}
        self.deltas: list[dict[str, Tensor]] = []
        self.stand: dict[int, Stand] = {}
        self.visited: set[str] = set()
        self.batch = 0
        self.inside = self.visiting = False


def check_samples(vectors: Sequence[TaskVector], samples: Sequence[Sequence[Batch]]) -> None:
    """Refuse samples that are not one set for each vector.

    Raises:
        LataError: Samples and vectors are not equally many, or a task has no samples.
    """
    if len(samples) != len(vectors):
        raise LataError(
            f"every vector needs the samples of its own task, in the same order: got {len(samples)} sets for {len(vectors)} vectors"
        )
    empty = [vector.label for vector, batches in zip(vectors, samples, strict=True) if not batches]
    if empty:
        raise LataError(f"every task needs samples; there are none for {', '.join(empty[:3])}")


def row_count(batches: Sequence[Batch]) -> int:
    """Rows in all batches."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def call(model: nn.Module, batch: Batch) -> Any:
    """Output of a model for a batch, with no cache of keys, which would take in those of every repetition."""
    inputs: dict[str, Any] = dict(batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with torch.no_grad():
        return model(**inputs)


def _first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in an output or among arguments, which holds the hidden states."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for entry in values if (found := _first_tensor(entry)) is not None), None)


def relative(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Tensors of a model under the names they have in one of its modules."""
    return {name.removeprefix(module + "."): tensor for name, tensor in tensors.items()}
