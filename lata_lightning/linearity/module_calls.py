"""Running the start model over samples, and repeating the calls of its modules with weights moved along a task vector.

Weights, sums and hidden states are in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lata_lightning.errors import LataError, first_three
from lata_lightning.linearity.blocks import Blocks, LayerModule
from lata_lightning.linearity.forward_pass import BlockwiseForward, WaitingCall, call, relative
from lata_lightning.linearity.padding import hidden_positions
from lata_lightning.linearity.samples import Batch
from lata_lightning.linearity.start import StartModel, open_start
from lata_lightning.store.writer import Progress
from lata_lightning.vectors.task_vector import TaskVector


class ModuleCall:
    """One call of a module of the start model on one batch, which can be repeated with moved weights.

    Attributes:
        layer: The layer that the module computes.
        batch: Number of the batch.
        inputs: Hidden states that the module takes in, of shape (positions, width); None unless they have the shape of its output.
        outputs: Hidden states that it returns, of shape (positions, width). Neither includes padding.
    """

    def __init__(self, runs: ModuleRuns, layer: LayerModule, batch: int, args: Any, kwargs: Any, output: Any) -> None:
        self.layer, self.batch = layer, batch
        self._runs, self._args, self._kwargs = runs, args, kwargs
        self.outputs = self._positions(output)
        given, returned = _first_tensor((*args, *kwargs.values())), _first_tensor(output)
        self.inputs = self._positions(given) if given is not None and returned is not None and given.shape == returned.shape else None

    def with_weights(self, vector: int, scale: float, tensors: Iterable[str] | None = None) -> Tensor:
        """Return the output for the same input with the weights start + scale · vector, of shape (positions, width).

        Args:
            vector: Number of the vector.
            scale: Dimensionless.
            tensors: Names of the tensors to move; by default those of the layer.
        """
        moved = set(self.layer.tensors if tensors is None else tensors)
        return self._positions(self._runs.evaluate(self.layer.module, self._args, self._kwargs, vector, scale, moved))

    def _positions(self, output: Any) -> Tensor:
        hidden = _first_tensor(output)
        if hidden is None:
            raise LataError(f"{self.layer.module} gives out no tensor, so that its outputs cannot be compared")
        return self._runs.without_padding(hidden, self.batch, self.layer.module)


class ModuleRuns:
    """The start model, task vectors, and samples to run through the model.

    Args:
        start: Directory or hub id of a transformers model, or a module (which is not changed).
        vectors: Task vectors from this start; their coefficients are ignored.
        batches: Inputs of the model by argument name, batch by batch. Positions where ``attention_mask`` (in a decoder of an encoder-decoder
            model, ``decoder_attention_mask``) is 0 are padding.
        check_base: Refuse vectors that are known to start from different weights.

    Attributes:
        model: The start model, without weights of the blocks.
        blocks: The blocks of the start model.
        source: The floating weights of the start, under the names under which transformers saves it.
        layers: Position of every tensor, under the same names.

    Raises:
        SourceError: The start cannot be read, or does not say which model it is.
        LayoutMismatchError: The tensors of a vector are not those of the model, or its model has other tokens or computes another function.
        BaseMismatchError: Two vectors start from different weights.
        WeightingError: No tensor belongs to a block.
        LataError: There is no vector, or one started from base.
    """

    def __init__(self, start: StartModel, vectors: Sequence[TaskVector], batches: Sequence[Batch], *, check_base: bool = True) -> None:
        opened = open_start(start, vectors, check_base=check_base)
        self.model, self.source, self._vectors, self.layers = opened.model, opened.weights, opened.vectors, opened.layers
        self._batches = batches
        self.blocks = Blocks(self.model, self.layers)
        self._block_tensors = self.blocks.tensors
        module = self.model.module
        self._body: nn.Module = getattr(module, "base_model", module)
        state = module.state_dict(keep_vars=True)
        needed = {id(tensor) for tensor in self._body.state_dict(keep_vars=True).values()}
        inside = {name for names in self._block_tensors.values() for name in names}
        self._outside = [name for name in self.model.names if name not in inside and id(state[name]) in needed]
        self._bytes = {path: sum(state[name].numel() for name in names) * 4 for path, names in self._block_tensors.items()}
        self._state = _RunState()
        self._forward = BlockwiseForward([module], self._block_tensors, self._run_block)
        for path in self._block_tensors:
            for name, part in module.get_submodule(path).named_modules(prefix=path):
                part.register_forward_hook(partial(self._called, name), with_kwargs=True)

    def run(
        self,
        layers: Sequence[LayerModule] = (),
        visit: Callable[[ModuleCall], None] | None = None,
        *,
        vector: int = 0,
        scale: float = 0.0,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Run the model over all batches, block by block.

        Args:
            layers: The layers to visit, while the model itself has the weights of the start.
            visit: Called for each of these layers after each call of its module.
            vector: Number of the vector to move the weights along.
            scale: The model runs with the weights start + scale · vector.
            progress: Called after each block is read, with the bytes read so far and the bytes in all.

        Returns:
            The output for each batch, of shape (positions, width) without padding; for transformers models with a body and a head, that of the body.

        Raises:
            LataError: The batches do not reach every layer.
        """
        state = self._state = _RunState(vector, scale, visit)
        for layer in layers:
            state.layers.setdefault(layer.module, []).append(layer)
        self.model.put(self._moved(self.model.read(self._outside, self.source), self._outside))
        reached: set[str] = set()

        def load(path: str) -> None:
            self._load(path)
            reached.add(path)
            if progress is not None:
                progress(sum(self._bytes[block] for block in reached), sum(self._bytes.values()))

        try:
            outputs = self._forward.run([partial(self._run, number) for number in range(len(self._batches))], load)
        finally:
            state.weights, state.deltas = {}, []
        missed = set(self._block_tensors) - reached if layers else set()
        missed |= {layer.module for layer in layers} - state.visited
        if missed:
            raise LataError(
                f"the samples must run through every layer; never run are {first_three(missed)}. Does the model need further inputs?"
            )
        return outputs

    def evaluate(self, module: str, args: Any, kwargs: Any, vector: int, scale: float, moved: set[str]) -> Any:
        """Return the output of a module of the loaded block, with some of its tensors moved."""
        weights = {name: tensor for name, tensor in self._state.weights.items() if name.startswith(module + ".")}
        deltas = self._state.deltas[vector]
        values = {name: tensor + scale * deltas[name] if name in moved else tensor for name, tensor in weights.items()}
        return functional_call(self.model.module.get_submodule(module), relative(values, module), args, kwargs)

    def without_padding(self, hidden: Tensor, batch: int, module: str) -> Tensor:
        """Return hidden states of a batch as (positions, width), without padding (see ``hidden_positions``)."""
        return hidden_positions(hidden, self._batches[batch], module)

    def _run(self, batch: int) -> Tensor:
        hidden = _first_tensor(call(self._body, self._batches[batch]))
        if hidden is None:
            raise LataError(f"{type(self._body).__name__} gives out no tensor")
        return self.without_padding(hidden, batch, list(self._block_tensors)[-1])

    def _run_block(self, waiting: WaitingCall) -> Any:
        state, path = self._state, waiting.path
        state.batch = waiting.number
        try:
            with torch.no_grad():
                return functional_call(self.model.module.get_submodule(path), relative(state.weights, path), waiting.args, waiting.kwargs)
        finally:
            state.batch = None

    def _called(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Visit the layers of a module after it was called in its block, but not after repeated calls."""
        state = self._state
        if state.batch is None or state.visiting or state.visit is None or path not in state.layers:
            return
        state.visiting = True
        state.visited.add(path)
        try:
            for layer in state.layers[path]:
                state.visit(ModuleCall(self, layer, state.batch, args, kwargs, output))
        finally:
            state.visiting = False

    def _load(self, path: str) -> None:
        names, state = self._block_tensors[path], self._state
        # Freed before the next block is read, so that two blocks are never in memory.
        state.weights, state.deltas = {}, []
        state.weights = self._moved(self.model.read(names, self.source), names)
        if state.visit is not None:
            state.deltas = [self.model.read(names, vector) for vector in self._vectors]

    def _moved(self, start: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        if self._state.scale == 0:
            return start
        deltas = self.model.read(names, self._vectors[self._state.vector])
        return {name: tensor + self._state.scale * deltas[name] for name, tensor in start.items()}


class _RunState:
    """State of one run over all batches; ``batch`` is the one whose block is evaluated, if any."""

    def __init__(self, vector: int = 0, scale: float = 0.0, visit: Callable[[ModuleCall], None] | None = None) -> None:
        self.vector, self.scale, self.visit = vector, scale, visit
        self.layers: dict[str, list[LayerModule]] = {}
        self.weights: dict[str, Tensor] = {}
        self.deltas: list[dict[str, Tensor]] = []
        self.visited: set[str] = set()
        self.batch: int | None = None
        self.visiting = False


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first floating tensor of an output or of arguments, which holds the hidden states."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((tensor for entry in values if (tensor := _first_tensor(entry)) is not None), None)
