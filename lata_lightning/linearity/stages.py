"""Running the start model over samples of several tasks, each with its own vector, and fitting every matrix where the samples come to it.

As in ``walk``, the model runs block by block; each embedding and linear layer outside the blocks is a stage of its own. Of one stage at a time there
are weights and matrices of inputs in memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lata_lightning.errors import CorruptFileError, LataError, first_three
from lata_lightning.linearity.lockstep import Stand, in_lockstep
from lata_lightning.linearity.matrices import Fit, Role, Seen, flattened
from lata_lightning.linearity.shell import Shell
from lata_lightning.linearity.walk import Batch, call, relative
from lata_lightning.numerics.matrix_regression import Settings
from lata_lightning.numerics.measure import all_finite
from lata_lightning.store.meta_model import copy_without_weights
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.views import Computed
from lata_lightning.store.writer import Progress


@final
class Merged(Computed):
    """Fitted matrices, and of every other tensor the mean of the vectors that hold it, which is computed when it is read.

    Args:
        vectors: Under one set of names.
        absent: For each vector the names of the tensors that it does not hold.
        location: What it is called.

    Attributes:
        fitted: By name, float32.
    """

    def __init__(self, vectors: Sequence[TensorSource], absent: Sequence[Collection[str]], location: str) -> None:
        super().__init__(vectors[0], Origin(location), dtype=torch.float32, parallel=all(vector.parallel for vector in vectors))
        self._vectors, self._absent = vectors, absent
        self.fitted: dict[str, Tensor] = {}

    @override
    def read(self, name: str) -> Tensor:
        if name in self.fitted:
            return self.fitted[name]
        total = torch.zeros(self.shape(name), dtype=torch.float64)
        holding = [vector for number, vector in enumerate(self._vectors) if self.holds(number, name)]
        for vector in holding:
            total += vector.read(name)
        return (total / max(len(holding), 1)).float()

    def holds(self, number: int, name: str) -> bool:
        """Whether one of the vectors holds a tensor."""
        return name not in self._absent[number]


class Stages:
    """The places at which all batches wait until what is there is fitted: blocks, and outside of them modules without parts that hold a matrix.

    Args:
        start: The start model.
        source: Its weights.
        vectors: By their names for messages.
        merged: Takes in what is fitted.
        blocks: Names of the tensors of each block, by path.
        unchanged: Stored tensors that need no fit.
        samples: Batches by task.
        in_order: Whether what is fitted is what goes on.
    """

    def __init__(
        self,
        start: Shell,
        source: TensorSource,
        vectors: Sequence[tuple[str, TensorSource]],
        merged: Merged,
        blocks: Mapping[str, Sequence[str]],
        unchanged: frozenset[str],
        samples: Sequence[Sequence[Batch]],
        *,
        in_order: bool,
    ) -> None:
        self._start, self._source, self._vectors, self._merged = start, source, vectors, merged
        self._blocks, self._in_order = blocks, in_order
        self._batches = [(task, batch) for task, batches in enumerate(samples) for batch in batches]
        # What stands outside the stages stays in a model while others wait, and each task may need its own.
        self._shells = [start] if in_order else [start, *(Shell(copy_without_weights(start.model)) for _ in vectors[1:])]
        matrices = {name for name, parameter in start.model.named_parameters(remove_duplicate=False) if parameter.ndim == 2}
        self._names = {**blocks, **_leaves(start, blocks, matrices)}
        moved, self._stored = set(merged.names) - unchanged, start.stored_names(matrices)
        self._pending = {
            path: found
            for path, names in self._names.items()
            if (found := {name for name in names if moved & self._stored.get(name, set())})
        }
        self._unread = {path: sum(math.prod(start.shape(name)) for name in names) * 4 for path, names in self._names.items()}
        self._size = sum(self._unread.values())
        self._thread = threading.local()
        self._calls: dict[int, tuple[str, Any, Any]] = {}
        self._outputs: dict[int, Any] = {}
        self._held: tuple[tuple[str, int], dict[str, Tensor]] | None = None
        within = {name for names in self._names.values() for name in names}
        outside = [name for name in start.names if name not in within]
        for task, shell in enumerate(self._shells):
            shell.put(self._weights(outside, task))
            for path in self._names:
                module = shell.model.get_submodule(path)
                module.forward = self._waiting(path, module.forward)

    def fit(self, *, off_diagonal: float, settings: Settings, progress: Progress | None) -> None:
        """Run the samples until every matrix they reach is fitted."""

        def arrive(path: str) -> None:
            self._held = None
            if progress is not None and self._unread.pop(path, 0):
                progress(self._size - sum(self._unread.values()), self._size)
            if path in self._pending:
                self._fit(path, off_diagonal, settings)
            if not self._pending:
                raise _FinishedError

        try:
            in_lockstep([partial(self._run, number) for number in range(len(self._batches))], arrive)
        except _FinishedError:
            pass
        finally:
            self._held = None

    def _run(self, number: int, stand: Stand) -> None:
        self._thread.stand, self._thread.number = stand, number
        task, batch = self._batches[number]
        call(self._model(task), batch)

    def _waiting(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def wait(*args: Any, **kwargs: Any) -> Any:
            stand: Stand | None = getattr(self._thread, "stand", None)
            if stand is None:
                # Not in the thread of a batch, but in what is done at a stage.
                return forward(*args, **kwargs)
            number = self._thread.number
            self._calls[number] = (path, args, kwargs)
            return stand(path, partial(self._leave, number))

        return wait

    def _leave(self, number: int) -> Any:
        """What a batch takes on from the stage at which it waits."""
        path, args, kwargs = self._calls.pop(number)
        if number in self._outputs:
            return self._outputs.pop(number)
        task = self._batches[number][0]
        key = (path, 0 if self._in_order else task)
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = (key, self._weights(self._names[path], task))
        return self._evaluate(path, task, self._held[1], args, kwargs)

    def _fit(self, path: str, off_diagonal: float, settings: Settings) -> None:
        """Fit the matrices of a stage to what every task's own weights take in there."""
        held = self._fill(self._names[path], self._source)
        fits: dict[str, Fit] = {}
        reached = [self._take(path, task, held, fits, off_diagonal) for task in range(len(self._vectors))]
        del held
        for task, (_, vector) in enumerate(self._vectors):
            for name in self._held_by(task, fits.keys() - reached[task]):
                fits[name].add(self._fill([name], vector)[name], None)
        # Each is solved and let go before the next.
        solved = {name: fits.pop(name).solve(settings) for name in list(fits)}
        known = set(self._merged.names)
        self._merged.fitted |= {name: tensor for name, tensor in self._start.stored(solved).items() if name in known}
        done = {other for name in solved for other in self._start.tied(name)}
        del self._pending[path]
        self._pending = {other: left for other, matrices in self._pending.items() if (left := matrices - done)}

    def _take(self, path: str, task: int, held: Mapping[str, Tensor], fits: dict[str, Fit], off_diagonal: float) -> set[str]:
        """Add a task to the fits of a stage whose start weights are held; the names of the matrices that its samples reach."""
        label, vector = self._vectors[task]
        delta = self._fill(self._names[path], vector)
        odd = [name for name in held if not all_finite(delta[name])]
        if odd:
            raise CorruptFileError(f"{label} holds NaN or infinite values in {first_three(odd)}")
        grams = self._seen(path, task, {name: tensor + delta[name] for name, tensor in held.items()}).grams
        for name in self._held_by(task, grams):
            gram = grams[name]
            mean = gram.mean(off_diagonal)
            if not mean.isfinite().all():
                raise CorruptFileError(f"NaN or infinite hidden states in {path}, from the weights of the start or of {label}")
            if name not in fits:
                fits[name] = Fit(gram.role, delta[name].shape)
            fits[name].add(delta[name], mean)
        return set(grams)

    def _held_by(self, task: int, names: Iterable[str]) -> list[str]:
        """Those of some matrices of which the vector of a task holds anything."""
        return [name for name in names if any(self._merged.holds(task, stored) for stored in self._stored[name])]

    def _seen(self, path: str, task: int, weights: Mapping[str, Tensor]) -> Seen:
        """What the matrices of a stage take in from the batches of a task that wait there."""
        seen = Seen({name: weights[name] for name in self._pending[path]})
        for number, (place, args, kwargs) in sorted(self._calls.items(), key=lambda entry: entry[0]):
            if place != path or self._batches[number][0] != task:
                continue
            seen.positions = partial(_without_padding, path, self._batches[number][1])
            with seen:
                output = self._evaluate(path, task, weights, args, kwargs)
            # Of a head it would be far larger than what went in.
            if not self._in_order and path in self._blocks:
                self._outputs[number] = output
        return seen

    def _evaluate(self, path: str, task: int, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return functional_call(self._model(task).get_submodule(path), relative(weights, path), args, kwargs)

    def _model(self, task: int) -> nn.Module:
        return self._shells[0 if self._in_order else task].model

    def _weights(self, names: Sequence[str], task: int) -> dict[str, Tensor]:
        """What goes on: the merged weights in order, those of the task otherwise."""
        delta = self._fill(names, self._merged if self._in_order else self._vectors[task][1])
        return {name: tensor + delta[name] for name, tensor in self._fill(names, self._source).items()}

    def _fill(self, names: Sequence[str], source: TensorSource) -> dict[str, Tensor]:
        held = set(source.names)
        return self._start.fill(names, lambda name: source.read(name) if name in held else None, source.label)


class _FinishedError(Exception):
    """Ends a run when nothing is left to be fitted: what would follow, such as logits, nobody needs."""


def _leaves(shell: Shell, blocks: Mapping[str, Sequence[str]], matrices: Collection[str]) -> dict[str, list[str]]:
    """Names of the tensors of every module outside the blocks that has no parts and holds a matrix, by path."""
    found = {}
    for path, module in shell.model.named_modules():
        inside = any(f"{path}.".startswith(f"{block}.") for block in blocks)
        names = [] if inside or next(module.children(), None) is not None else [name for name in shell.names if name.startswith(f"{path}.")]
        if any(name in matrices for name in names):
            found[path] = names
    return found


def _without_padding(path: str, batch: Batch, inputs: Tensor, role: Role) -> Tensor:
    """Inputs of a matrix one under the other, without padding.

    Raises:
        LataError: There is padding in the batch, and the inputs do not come as (rows, positions, width).
    """
    flat = flattened(inputs, role)
    masks = [batch["attention_mask"]] if "attention_mask" in batch else []
    if "decoder_input_ids" in batch:
        decoding = batch.get("decoder_attention_mask", torch.ones_like(batch["decoder_input_ids"]))
        steps = path.split(".")
        # A table outside of both is what the encoder looks its tokens up in first.
        first = "encoder" in steps or (role == "table" and "decoder" not in steps)
        masks = [*masks, decoding] if first else [decoding, *masks]
    if all(mask.all() for mask in masks):
        return flat
    places = inputs.shape if role == "table" else inputs.shape[:-1]
    for mask in masks:
        if places in (mask.shape, (mask.numel(),)):
            return flat[mask.reshape(-1).bool()]
    # Positions and the like are looked up once for all rows, and a pooled row is no position.
    if role == "table" or places == masks[0].shape[:1]:
        return flat
    raise LataError(
        f"a linear layer of {path} takes in inputs of shape {tuple(inputs.shape)}, in which the padding of a batch of shape {tuple(masks[0].shape)} "
        "cannot be found. Give batches without padding, such as batches of one row."
    )
