"""A model's outputs as a function of its weights, and weights along task vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lata_lightning.errors import LataError, LayoutMismatchError, differing, first_three
from lata_lightning.evaluation.modes import evaluating
from lata_lightning.store.checkpoint_names import under_checkpoint_names

Outputs = Callable[[nn.Module, Any], Tensor]


def model_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Return the output of a model for a batch if it is a tensor, else its ``logits``.

    Args:
        model: Called with the entries of a mapping as keywords, otherwise with the batch itself.
        batch: One batch, without labels.

    Raises:
        LataError: The output is neither a tensor nor has logits; pass a function of your own.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise LataError(f"the model's output must be a tensor or have logits, got {type(output).__name__}; give outputs=…")
    return output


class WeightFunction:
    """Outputs of a model at arbitrary weights; the model itself never changes.

    Args:
        model: Its parameters and floating buffers are the start weights, unless others are given.
        start: Start weights by parameter name; for absent ones the model's own are used.
        outputs: Takes model and batch, and returns a tensor; see ``model_outputs``.

    Raises:
        LayoutMismatchError: Start weights have names that the model does not have, or another shape.
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Tensor] | None = None, outputs: Outputs = model_outputs) -> None:
        self._called = _Called(model, outputs)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.start = {name: tensor.detach() for name, tensor in state.items() if tensor.is_floating_point()}
        # Transformers saves some architectures under other names than those of their modules, and a saved vector has the saved names.
        own = {id(tensor): name for name, tensor in self.start.items()}
        saved = under_checkpoint_names(model, self.start)
        self._own_names = {name: own[id(tensor)] for name, tensor in saved.items() if id(tensor) in own}
        if start is not None:
            self.start |= {name: tensor.to(self.start[name].dtype) for name, tensor in self.load(start, "the start weights").items()}

    def load(self, vector: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """Return the tensors of a vector by the model's names, on the device of the weights and in float32 or better.

        Raises:
            LayoutMismatchError: The model does not have these weights, or has them in another shape.
        """
        named = {name if name in self.start else self._own_names.get(name, name): name for name in vector}
        unknown = set(named) - set(self.start)
        if unknown:
            raise LayoutMismatchError(
                f"{what} must hold parameters of the model; it has none named {first_three(unknown)}. Name them as named_parameters() does."
            )
        tensors = {
            own: vector[name].detach().to(self.start[own].device, torch.promote_types(self.start[own].dtype, torch.float32))
            for own, name in named.items()
        }
        odd = [own for own, tensor in tensors.items() if tensor.shape != self.start[own].shape]
        if odd:
            raise LayoutMismatchError(f"{what} must have the shapes of the model; {differing(odd, len(tensors))}")
        return tensors

    def at(self, vectors: Sequence[Mapping[str, Tensor]], scales: Sequence[float]) -> dict[str, Tensor]:
        """Return start + Σ scale · vector, rounded once to the precision of the start; bit for bit the start where every scale is 0."""
        sums: dict[str, Tensor] = {}
        for vector, scale in zip(vectors, scales, strict=True):
            if scale != 0:
                sums |= {name: sums.get(name, self.start[name]) + scale * delta for name, delta in vector.items()}
        return {**self.start, **{name: total.to(self.start[name].dtype) for name, total in sums.items()}}

    def __call__(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the outputs of the model with these weights in place of its own."""
        outputs: Tensor = functional_call(self._called, {f"model.{name}": tensor for name, tensor in weights.items()}, (batch,))
        return outputs

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a block of evaluation mode, without gradients; afterwards every module has the mode it had."""
        return evaluating(self._called.model, inference=False)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the scales as a tuple.

    Raises:
        LataError: There is no scale, or one is not a finite number.
    """
    checked = tuple(float(scale) for scale in scales)
    if not checked or not all(isfinite(scale) for scale in checked):
        raise LataError(f"scales must be finite numbers, at least one, got {list(scales)}")
    return checked


class _Called(nn.Module):
    """A function of model and batch as a module, whose only parameters are the model's."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model, self._outputs = model, outputs

    def forward(self, batch: Any) -> Tensor:
        return self._outputs(self.model, batch)
