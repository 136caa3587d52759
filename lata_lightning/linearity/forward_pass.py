"""Forward passes of several batches, block by block: no batch enters a block before all batches have reached it.

So each block is read once, and the weights of one block at a time are in memory. Everything here that runs a model over samples does so: ``module_calls``
repeats calls of modules with moved weights, ``matrix_fitting`` fits the matrices of a block before the batches go through it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lata_lightning.linearity.barrier import Wait, run_with_barriers
from lata_lightning.linearity.samples import Batch

Result = TypeVar("Result")


class WaitingCall(NamedTuple):
    """A call of a module by one forward pass, which waits to be evaluated.

    Attributes:
        number: Number of the forward pass.
        path: Path of the module.
        args, kwargs: Arguments of the call.
    """

    number: int
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockwiseForward:
    """Forward passes that wait for each other at some modules; only one of them runs at a time.

    Args:
        models: Models of the same structure; their modules wait from now on, unless they are called by ``evaluate``.
        paths: Paths of the modules that wait, such as the blocks.
        evaluate: Returns the output of a waiting call.

    Attributes:
        waiting: The waiting calls, by number of the forward pass.
    """

    def __init__(self, models: Iterable[nn.Module], paths: Iterable[str], evaluate: Callable[[WaitingCall], Any]) -> None:
        self.waiting: dict[int, WaitingCall] = {}
        self._evaluate = evaluate
        self._thread = threading.local()
        paths = list(paths)
        for model in models:
            for path in paths:
                module = model.get_submodule(path)
                module.forward = self._waiting(path, module.forward)

    def run(self, passes: Sequence[Callable[[], Result]], at_barrier: Callable[[str], None]) -> list[Result]:
        """Run forward passes and return their results.

        Args:
            passes: Each calls one of the models.
            at_barrier: Called with the path of a module when all passes that come to it have reached it, before any of them goes through it.

        Raises:
            BaseException: Whatever a pass, ``evaluate`` or ``at_barrier`` raises.
        """
        self.waiting.clear()
        return run_with_barriers([partial(self._run, number, forward) for number, forward in enumerate(passes)], at_barrier)

    def _run(self, number: int, forward: Callable[[], Result], wait: Wait) -> Result:
        self._thread.wait, self._thread.number = wait, number
        return forward()

    def _waiting(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def wait_for_others(*args: Any, **kwargs: Any) -> Any:
            wait: Wait | None = getattr(self._thread, "wait", None)
            if wait is None:
                # This is no thread of a forward pass, but the one that evaluates the waiting calls.
                return forward(*args, **kwargs)
            number: int = self._thread.number
            self.waiting[number] = WaitingCall(number, path, args, kwargs)
            return wait(path, lambda: self._evaluate(self.waiting.pop(number)))

        return wait_for_others


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the output of a model for a batch, without a cache of keys and values, which repeated calls would add to."""
    inputs: dict[str, Any] = dict(batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with torch.no_grad():
        return model(**inputs)


def relative(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Return tensors of a model by their names within one of its modules."""
    return {name.removeprefix(module + "."): tensor for name, tensor in tensors.items()}
