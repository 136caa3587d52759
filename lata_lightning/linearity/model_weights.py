"""The weights of a model: the stored tensors they are read from, and putting them into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lata_lightning.errors import LayoutMismatchError, first_three
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.names import differing_prefixes, keyed
from lata_lightning.store.sources import TensorSource


class ModelWeights:
    """The floating parameters and saved buffers of a model, which are read from stored tensors, some of them at a time.

    Args:
        module: A model, with or without weights; ``put`` changes it.

    Attributes:
        module: The model.
        names: Names of its floating parameters and saved buffers, with all names of tied tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        state = module.state_dict(keep_vars=True)
        self._state = {name: entry for name, entry in state.items() if isinstance(entry, Tensor) and entry.is_floating_point()}
        self.names = tuple(self._state)
        self._groups: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._groups.setdefault(id(tensor), []).append(name)
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._state.items()}
        self._saved = set(under_checkpoint_names(module, empty))

    def names_of(self, source: TensorSource) -> dict[str, str]:
        """Return the names of stored tensors in a source, by the names under which transformers saves this model.

        They differ where one side has a prefix that the other lacks, as for GPT-2 on the hub, and in the spelling of older releases.
        """
        known = keyed(source.names, source.label)
        extra, missing = differing_prefixes(known, self._saved, source.label)
        return {name if name in self._saved else missing + name.removeprefix(extra): stored for name, stored in known.items()}

    def stored_names(self, names: Iterable[str]) -> dict[str, set[str]]:
        """Return, for tensors of the model, the names under which they, or parts of them, may be stored."""
        by_name = {name: {other for other in self._groups[id(self._state[name])] if other in self._saved} for name in names}
        renamed = [name for name, stored in by_name.items() if not stored]
        ends = torch.tensor([self._state[name].numel() for name in renamed]).cumsum(0)
        for stored, indices in self._conversion(renamed).items():
            owners = torch.bincount(torch.bucketize(indices.reshape(-1), ends, right=True))
            for position in owners.nonzero().flatten().tolist():
                by_name[renamed[position]].add(stored)
        return by_name

    def fill(
        self, names: Iterable[str], stored: Callable[[str], Tensor | None], label: str, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the values of tensors of the model, from stored tensors.

        Args:
            names: Names of the tensors.
            stored: Returns the stored tensor of a name; None if there is none.
            label: Name of the stored tensors, for messages.
            dtype: Dtype of the values.

        Returns:
            Values by name, without saved buffers that are not stored, which keep their values. Tied tensors are one tensor.

        Raises:
            LayoutMismatchError: A parameter is not stored, or has another shape.
        """
        values: dict[int, Tensor] = {}
        missing: list[str] = []
        converted: list[str] = []
        names = list(names)
        for name in names:
            tensor = self._state[name]
            if id(tensor) in values:
                continue
            group = self._groups[id(tensor)]
            if not any(other in self._saved for other in group):
                converted.append(name)
                continue
            value = next((value for other in group if other in self._saved and (value := stored(other)) is not None), None)
            if value is not None and value.shape != tensor.shape:
                raise LayoutMismatchError(
                    f"{name} of {label} has the shape {tuple(value.shape)}, and the model needs {tuple(tensor.shape)}"
                )
            if value is not None:
                values[id(tensor)] = value.to(dtype)
            elif tensor.is_meta:
                missing.append(name)
        sizes = [self._state[name].numel() for name in converted]
        flat = torch.empty(sum(sizes), dtype=dtype)
        for key, indices in self._conversion(converted).items():
            value = stored(key)
            if value is None:
                missing.append(key)
            else:
                flat[indices.reshape(-1)] = value.to(dtype).reshape(-1)
        if missing:
            raise LayoutMismatchError(f"{label} must hold all tensors that the model needs; missing are {first_three(missing)}")
        parts = zip(converted, torch.split(flat, sizes), strict=True)
        values |= {id(self._state[name]): part.view(self._state[name].shape) for name, part in parts}
        return {name: values[id(self._state[name])] for name in names if id(self._state[name]) in values}

    def read(self, names: Iterable[str], source: TensorSource) -> dict[str, Tensor]:
        """Read the values of tensors of the model from a source, in float32; results and errors as for ``fill``."""
        known = set(source.names)
        return self.fill(names, lambda name: source.read(name) if name in known else None, source.label)

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values of tensors of the model by their stored names, tied ones by all of them: the inverse of ``fill``."""
        stored: dict[str, Tensor] = {}
        converted: dict[str, Tensor] = {}
        for name, value in tensors.items():
            saved = [other for other in self.tied(name) if other in self._saved]
            stored |= dict.fromkeys(saved, value)
            if not saved:
                converted[name] = value
        return stored | under_checkpoint_names(self.module, converted) if converted else stored

    def tied(self, name: str) -> tuple[str, ...]:
        """Return all names in the model of a tensor, in the same order whichever name is given."""
        return tuple(self._groups[id(self._state[name])])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the model."""
        return tuple(self._state[name].shape)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set tensors of the model, tied ones to one value."""
        self.module.load_state_dict(tensors, strict=False, assign=True)

    def _conversion(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return how tensors of the model are converted when they are stored.

        Returns:
            For each stored name, in the stored shape, the index of each entry in the concatenation of the flattened tensors of the model.
        """
        if not names:
            return {}
        indices, begin = {}, 0
        for name in names:
            shape = self._state[name].shape
            indices[name] = torch.arange(begin, begin + shape.numel()).view(shape)
            begin += shape.numel()
        # The conversion for saving, applied to indices, says where each entry goes, and so how to invert it.
        return under_checkpoint_names(self.module, indices)
