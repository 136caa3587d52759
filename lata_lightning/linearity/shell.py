"""A model without weights, and which stored tensors each of its parts is filled with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lata_lightning.errors import LayoutMismatchError, first_three
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.names import differing_prefixes, keyed
from lata_lightning.store.sources import TensorSource


class Shell:
    """A model whose tensors are filled in from stored ones, part by part.

    Args:
        model: Without weights; belongs to the shell from now on.

    Attributes:
        model: The model.
        names: Names of its parameters and saved buffers that are floating; those of one tied group all stand here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        state = model.state_dict(keep_vars=True)
        self._state = {name: entry for name, entry in state.items() if isinstance(entry, Tensor) and entry.is_floating_point()}
        self.names = tuple(self._state)
        self._groups: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._groups.setdefault(id(tensor), []).append(name)
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._state.items()}
        self._saved = set(under_checkpoint_names(model, empty))

    def names_of(self, source: TensorSource) -> dict[str, str]:
        """Return the names that stored tensors have in a source, by those under which transformers saves this model.

        They differ where one side has a prefix that the other lacks, as GPT-2 on the hub, and in the spelling of older releases.
        """
        known = keyed(source.names, source.label)
        extra, missing = differing_prefixes(known, self._saved, source.label)
        return {name if name in self._saved else missing + name.removeprefix(extra): stored for name, stored in known.items()}

    def stored_names(self, names: Iterable[str]) -> dict[str, set[str]]:
        """For tensors of the model, the names under which they, or pieces of them, may be stored."""
        found = {name: {other for other in self._groups[id(self._state[name])] if other in self._saved} for name in names}
        renamed = [name for name, stored in found.items() if not stored]
        ends = torch.tensor([self._state[name].numel() for name in renamed]).cumsum(0)
        for stored, indices in self._conversion(renamed).items():
            owners = torch.bincount(torch.bucketize(indices.reshape(-1), ends, right=True))
            for position in owners.nonzero().flatten().tolist():
                found[renamed[position]].add(stored)
        return found

    def fill(
        self, names: Iterable[str], stored: Callable[[str], Tensor | None], label: str, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Values for tensors of the model.

        Args:
            names: The tensors.
            stored: The stored tensor of a name; None if there is none.
            label: Where they are stored, for messages.
            dtype: Of the values.

        Returns:
            By name, without saved buffers that are not stored: those keep the values they have. Tied tensors are one tensor.

        Raises:
            LayoutMismatchError: A parameter is not stored, or not in its shape.
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
        pieces = zip(converted, torch.split(flat, sizes), strict=True)
        values |= {id(self._state[name]): piece.view(self._state[name].shape) for name, piece in pieces}
        return {name: values[id(self._state[name])] for name in names if id(self._state[name]) in values}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of tensors of the model under the names by which they are stored, tied ones under all of theirs: the inverse of ``fill``."""
        found: dict[str, Tensor] = {}
        converted: dict[str, Tensor] = {}
        for name, value in tensors.items():
            saved = [other for other in self.tied(name) if other in self._saved]
            found |= dict.fromkeys(saved, value)
            if not saved:
                converted[name] = value
        return found | under_checkpoint_names(self.model, converted) if converted else found

    def tied(self, name: str) -> tuple[str, ...]:
        """All names in the model of the tensor of this name, in one order whichever of them is given."""
        return tuple(self._groups[id(self._state[name])])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the model."""
        return tuple(self._state[name].shape)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors of the model values, tied ones one value."""
        self.model.load_state_dict(tensors, strict=False, assign=True)

    def _conversion(self, names: Sequence[str]) -> dict[str, Tensor]:
        """How tensors of the model are stored that are not stored as they are.

        Returns:
            By stored name, in the stored shape: where each entry belongs when the tensors of the model are laid end to end.
        """
        if not names:
            return {}
        indices, begin = {}, 0
        for name in names:
            shape = self._state[name].shape
            indices[name] = torch.arange(begin, begin + shape.numel()).view(shape)
            begin += shape.numel()
        # How to save is known. Done to indices, it tells where every entry goes, and so how to undo it.
        return under_checkpoint_names(self.model, indices)
