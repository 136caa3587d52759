"""Setting the weights of one model in memory to many scales of task vectors, and choosing a scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.merging.sum import Sum
from lata_lightning.merging.term import Term
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.sources import Origin, StateDictSource, TensorSource
from lata_lightning.vectors.task_vector import TaskVector


class ResidualSearch(NamedTuple):
    """Result of ``scale_for_residual``: the scale, and the residual at every scale that was tried."""

    scale: float | None
    tried: dict[float, float]


class Reweighting:
    """A model whose weights can be set, again and again, to its own plus Σ scale · coefficient · vector.

    The weights are bit for bit those that ``merge`` writes for the same terms. As there, tensors are matched by the names under which transformers
    saves the model. A copy of the model and the vectors that are not in files are kept in memory, on the CPU; vectors in files are read again each
    time.

    Args:
        model: Changed in place by ``apply``; ``restore`` sets its own weights again.
        dtypes: Precision of the stored tensors, by their names in files, where the model has them in a wider one: sums are rounded to it, as a merge
            of the files rounds them.
    """

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self._model = ModelWeights(model)
        state = model.state_dict(keep_vars=True)
        # Tied tensors are one tensor under several names.
        self._tensors = {id(state[name]): (name, state[name].detach()) for name in reversed(self._model.names)}
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors.values()}
        saved = under_checkpoint_names(model, copies)
        self._copied: dict[int, TensorSource] = {}
        narrowed = {name: _narrowed(tensor, (dtypes or {}).get(name)) for name, tensor in saved.items()}
        self._onto = StateDictSource(narrowed, Origin("the model", config=StateDictSource(model).config))

    def apply(self, terms: Sequence[Term]) -> None:
        """Set the weights to onto + Σ scale · coefficient · vector.

        Raises:
            LayoutMismatchError: The tensors of a vector are not those of the model.
        """
        if not terms:
            self._set({name: name for name in self._onto.names}, self._onto.read)
            return
        total = Sum([self._fixed(term) for term in terms], self._onto, check_base=False)
        # A sum has the names of its vectors, which may lack the prefix of the model.
        known = set(self._onto.names)
        own = {name if name in known else total.weights.origin_name(name): name for name in total.names}
        self._set(own, lambda name: total.merged(name, None), total)

    def restore(self) -> None:
        """Set the model's own weights again."""
        self.apply([])

    def _set(self, names: Mapping[str, str], read: Callable[[str], Tensor], total: Sum | None = None) -> None:
        """Set every tensor of the model; from a sum, chunk by chunk where the tensor is stored under one name.

        Args:
            names: The name to read, by the name under which transformers saves the tensor.
            read: Reads a tensor.
            total: The sum, if tensors are read from one.
        """
        for name, tensor in self._tensors.values():
            whole = next((other for other in self._model.tied(name) if other in names), None)
            if total is not None and whole is not None and total.weights.shape(names[whole]) == tensor.shape and tensor.is_contiguous():
                flat, begin = tensor.view(-1), 0
                for chunk in total.chunks(names[whole]):
                    flat[begin : begin + len(chunk)].copy_(chunk)
                    begin += len(chunk)
                continue
            values = self._model.fill([name], lambda key: read(names[key]) if key in names else None, "the model", tensor.dtype)
            for value in values.values():
                tensor.copy_(value)

    def _fixed(self, term: Term) -> Term:
        """Return the term with a copy of its vector, unless that lies in files: in memory it may be computed from the weights that change here."""
        source = term.vector.tensors
        if all(_in_files(source, name) for name in source.names):
            return term
        # Vectors that differ only in their coefficients share one source.
        if id(source) not in self._copied:
            self._copied[id(source)] = StateDictSource(
                {name: source.read(name).clone() for name in source.names}, Origin(term.vector.label)
            )
        return replace(term, vector=TaskVector(self._copied[id(source)], term.vector.manifest))


def best_scale(scores: Mapping[float, float]) -> float:
    """Return the scale with the highest score; of equal ones the smallest, which changes the model least.

    Raises:
        LataError: There is no score.
    """
    if not scores:
        raise LataError("there is no scale to choose from: score at least one")
    return min(scores, key=lambda scale: (-scores[scale], abs(scale)))


def scale_for_residual(residual_at: Callable[[float], float], scales: Sequence[float], wanted: float, halvings: int = 6) -> ResidualSearch:
    """Search for the smallest scale at which a residual has fallen to a wanted value.

    The scales are tried in order until one reaches the value; then the interval below it is bisected.

    Args:
        residual_at: Returns how much of the unwanted skill remains at a scale.
        scales: At least two, in ascending order.
        wanted: The residual to reach, in the same unit.
        halvings: Number of bisections of the interval between the last scale that does not reach the value and the first that does.

    Returns:
        The scale (None if no scale reaches the value) and the residual at every scale that was tried.

    Raises:
        LataError: Fewer than two scales, or scales that do not rise.
    """
    if len(scales) < 2 or any(left >= right for left, right in pairwise(scales)):
        raise LataError(f"forgetting needs at least two rising scales to search, got {list(scales)}")
    tried: dict[float, float] = {}
    previous = scales[0]
    for scale in scales:
        tried[scale] = residual_at(scale)
        if tried[scale] <= wanted:
            break
        previous = scale
    else:
        return ResidualSearch(None, tried)
    left, right = previous, scale
    for _ in range(halvings if left < right else 0):
        middle = (left + right) / 2
        tried[middle] = residual_at(middle)
        left, right = (left, middle) if tried[middle] <= wanted else (middle, right)
    return ResidualSearch(right, tried)


def _in_files(source: TensorSource, name: str) -> bool:
    """Return whether a tensor is read from files, or is stored as factors, so that it cannot change with a model in memory."""
    sides = source.sides(name)
    if sides is not None:
        tuned, start, side_name = sides
        return _in_files(tuned, side_name) and _in_files(start, side_name)
    return source.byte_range(name) is not None or source.low_rank(name) is not None


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the tensor in its stored precision, if that represents all its values exactly."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
