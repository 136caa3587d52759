"""Trying many scales on one model in memory, and choosing among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError
from lata_lightning.linearity.shell import Shell
from lata_lightning.merging.sum import Sum
from lata_lightning.merging.term import Term
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.sources import StateDictSource, TensorSource
from lata_lightning.vectors.task_vector import TaskVector


class ResidualSearch(NamedTuple):
    """Outcome of ``scale_for_residual``: the scale found, and the residual at every scale tried."""

    scale: float | None
    tried: dict[float, float]


class Reweighting:
    """A model whose weights are set, point by point, to its own plus Σ scale · coefficient · vector.

    The weights are bit for bit those that ``merge`` writes for the same terms, and vectors are matched with the model by the same names: those under which
    transformers saves it. In memory are a copy of the model, on the CPU, and those vectors that are not in files; others are read again for every point.

    Args:
        model: Changed in place by ``apply``; ``restore`` gives it its own weights back.
        dtypes: Precision in which a tensor is stored, by its name in files, where the model holds it in a wider one: sums are rounded to it, as a
            merge of the files rounds them.
    """

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self._shell = Shell(model)
        state = model.state_dict(keep_vars=True)
        # Tied tensors are one tensor under several names.
        self._tensors = {id(state[name]): (name, state[name].detach()) for name in reversed(self._shell.names)}
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors.values()}
        saved = under_checkpoint_names(model, copies)
        self._copied: dict[int, TensorSource] = {}
        narrowed = {name: _narrowed(tensor, (dtypes or {}).get(name)) for name, tensor in saved.items()}
        self._onto = StateDictSource(narrowed, "the model", StateDictSource(model).config)

    def apply(self, terms: Sequence[Term]) -> None:
        """Set the weights to onto + Σ scale · coefficient · vector.

        Raises:
            LayoutMismatchError: A vector does not hold the tensors of the model.
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
        """Give the model its own weights back."""
        self.apply([])

    def _set(self, names: Mapping[str, str], read: Callable[[str], Tensor], total: Sum | None = None) -> None:
        """Set every tensor of the model to what is read; with a sum, piece by piece where it is stored as one tensor.

        Args:
            names: What to read, by the name under which transformers saves it.
            read: Reads it.
            total: The sum, if it is one.
        """
        for name, tensor in self._tensors.values():
            whole = next((other for other in self._shell.tied(name) if other in names), None)
            if total is not None and whole is not None and total.weights.shape(names[whole]) == tensor.shape and tensor.is_contiguous():
                flat, begin = tensor.view(-1), 0
                for piece in total.pieces(names[whole]):
                    flat[begin : begin + len(piece)].copy_(piece)
                    begin += len(piece)
                continue
            values = self._shell.fill([name], lambda key: read(names[key]) if key in names else None, "the model", tensor.dtype)
            for value in values.values():
                tensor.copy_(value)

    def _fixed(self, term: Term) -> Term:
        """The term with a vector that stays as it is when the model changes, from which a difference in memory may be taken."""
        source = term.vector.tensors
        if all(_in_files(source, name) for name in source.names):
            return term
        # Vectors that differ in coefficients only share one source.
        if id(source) not in self._copied:
            self._copied[id(source)] = StateDictSource({name: source.read(name).clone() for name in source.names}, term.vector.label)
        return replace(term, vector=TaskVector(self._copied[id(source)], term.vector.manifest))


def best_scale(scores: Mapping[float, float]) -> float:
    """The scale of the highest score; of equal ones the smallest, which changes the model least.

    Raises:
        LataError: There is no score.
    """
    if not scores:
        raise LataError("there is no scale to choose from: score at least one")
    return min(scores, key=lambda scale: (-scores[scale], abs(scale)))


def scale_for_residual(residual_at: Callable[[float], float], scales: Sequence[float], wanted: float, halvings: int = 6) -> ResidualSearch:
    """The smallest scale at which a residual has fallen to a wanted value.

    The scales are tried in order until one reaches the value; the interval before it is then halved.

    Args:
        residual_at: What is left of the unwanted skill at a scale.
        scales: Rising, at least two; the first is where forgetting starts from.
        wanted: The residual to reach, in the same unit.
        halvings: Of the interval between the last scale that does not reach the value and the first that does.

    Returns:
        The scale (None if no scale tried reaches the value) and everything that was tried on the way.

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
    """Whether a tensor is read from files, or is factors, which no model in training holds."""
    sides = source.sides(name)
    if sides is not None:
        tuned, start, held = sides
        return _in_files(tuned, held) and _in_files(start, held)
    return source.byte_range(name) is not None or source.low_rank(name) is not None


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the precision it is stored in, if that holds all its values."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
