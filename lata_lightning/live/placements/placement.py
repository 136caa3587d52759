"""What a strategy tells of a tensor: which part of it lies on this process, and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lata_lightning.live.placements.region import Region


class Placement(ABC):
    """One tensor of a model in training, as it lies on this process."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of ``values``: the highest precision in which the trainer keeps the tensor."""

    @property
    @abstractmethod
    def region(self) -> Region:
        """The entries that lie on this process."""

    @property
    @abstractmethod
    def replicated(self) -> bool:
        """Whether every process has the whole tensor because the strategy copies it, so that they may share out the tensors by name."""

    @property
    @abstractmethod
    def changes(self) -> bool:
        """Whether training can change the tensor now: a parameter that asks for a gradient, or a buffer."""

    @property
    @abstractmethod
    def is_buffer(self) -> bool:
        """Whether the tensor is no parameter."""

    @property
    @abstractmethod
    def materialized(self) -> bool:
        """Whether the tensor has values: not on the meta device."""

    @property
    @abstractmethod
    def template(self) -> Tensor:
        """A tensor of the whole shape that stands for this one where names are found: the tensor itself if it is replicated, else an empty one."""

    @abstractmethod
    def values(self) -> Tensor:
        """Return the values in the region, of its size, detached. They may be a view of what training changes."""

    @abstractmethod
    def rounded(self, start: Tensor) -> Tensor:
        """Return start values from a file as the strategy loads them: in ``dtype``, rounded to the precision it keeps them in on the way."""

    @abstractmethod
    def keeps(self, dtype: torch.dtype) -> bool:
        """Return whether start values of a dtype are loaded without rounding."""


class Strategy(ABC):
    """The placements of all tensors of a model under one strategy."""

    @abstractmethod
    def parameters(self, module: nn.Module) -> dict[str, Placement]:
        """Return the placements of the floating parameters of a module, by name, tied ones once, under their first name.

        Names are those in the module, without what wrappers add to them (see ``unwrapped``).
        """

    @abstractmethod
    def of(self, parameter: Tensor) -> Placement:
        """Return the placement of one parameter of the model."""

    @abstractmethod
    def whole(self, parameter: Tensor) -> Tensor:
        """Return all values of a small parameter, such as a factor of an adapter, at full precision. Every process has to call this."""

    @abstractmethod
    def ties(self, module: nn.Module) -> Iterable[Iterable[str]]:
        """Return the groups of names in a module that are one tensor."""


def empty_template(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a template without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def by_template(placements: Mapping[str, Placement]) -> dict[int, Placement]:
    """Return placements by the identity of their templates."""
    return {id(placement.template): placement for placement in placements.values()}
