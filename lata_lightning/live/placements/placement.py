"""What a strategy tells of a tensor: which part of it lies on this process, and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.layers import unwrapped
from lata_lightning.live.placements.region import Region
from lata_lightning.store.checkpoint_names import tied_groups


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

    @property
    @abstractmethod
    def loaded_dtype(self) -> torch.dtype:
        """Dtype in which the strategy loads the tensor from a file, before it is cast to ``dtype``."""

    def rounded(self, start: Tensor) -> Tensor:
        """Return start values from a file as the strategy loads them: rounded to ``loaded_dtype``, then cast to ``dtype``."""
        return start.to(self.loaded_dtype).to(self.dtype)

    def keeps(self, dtype: torch.dtype) -> bool:
        """Return whether start values of a dtype are loaded without rounding."""
        return dtype == self.loaded_dtype


class Sharded(Placement):
    """A tensor that the strategy cuts into parts, of which this process has one, or none.

    Args:
        shape: Shape of the whole tensor.
        dtype: Dtype of the template.
        trains: The tensor whose ``requires_grad`` says whether training changes this one, and whose type says whether it is a parameter.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, trains: Tensor) -> None:
        self._shape, self._trains = shape, trains
        self._template = torch.empty(shape, dtype=dtype, device="meta")

    @property
    @final
    @override
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    @final
    @override
    def replicated(self) -> bool:
        return False

    @property
    @final
    @override
    def changes(self) -> bool:
        return self.is_buffer or self._trains.requires_grad

    @property
    @final
    @override
    def is_buffer(self) -> bool:
        return not isinstance(self._trains, nn.Parameter)

    @property
    @final
    @override
    def template(self) -> Tensor:
        return self._template


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


class PerParameter(Strategy):
    """A strategy under which the parameters of a model are still separate tensors with their own names."""

    @final
    @override
    def parameters(self, module: nn.Module) -> dict[str, Placement]:
        # The method of nn.Module is called, as that of the module may be overridden and need not take arguments.
        named = nn.Module.named_parameters(module)
        return {unwrapped(name): self.of(parameter) for name, parameter in named if parameter.is_floating_point()}

    @final
    @override
    def ties(self, module: nn.Module) -> Iterable[Iterable[str]]:
        return tied_groups(module)


def by_template(placements: Mapping[str, Placement]) -> dict[int, Placement]:
    """Return placements by the identity of their templates."""
    return {id(placement.template): placement for placement in placements.values()}
