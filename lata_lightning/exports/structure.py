"""Which module holds a tensor of a checkpoint, and what peft can do with that module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError, first_three
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.meta_model import meta_model
from lata_lightning.store.names import differing_prefixes
from lata_lightning.store.sources import TensorSource

Form = Literal["linear", "turned", "embedding", "convolution"]


@dataclass(frozen=True)
class Held:
    """One tensor of a model.

    Attributes:
        names: Every name it has in the module; several where weights are tied.
        pieces: The names a checkpoint stores it under; several where it is made of several tensors, as the experts of a mixture are.
        plain: Whether the only piece is the tensor itself, in its own shape.
    """

    names: tuple[str, ...]
    pieces: tuple[str, ...]
    plain: bool

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that hold it."""
        return tuple(name.rpartition(".")[0] for name in self.names)


class Structure:
    """The empty model of a config, with the way from checkpoint names to modules.

    Attributes:
        module: The model, with meta tensors.
        by_name: What the model holds, by every name in the module.
        by_piece: The same, by every name in a checkpoint.

    Raises:
        LataError: The start has no config, or transformers cannot build the model it describes.
    """

    def __init__(self, source: TensorSource) -> None:
        if source.config is None:
            raise LataError(
                f"{source.label} has no config.json, which says what its modules are: name a model directory (onto=…, --onto MODEL)"
            )
        module = meta_model(source.config)
        if module is None:
            raise LataError(
                f"transformers cannot build the model that the config of {source.label} describes "
                f"(architectures: {source.config.get('architectures')}), so its modules are not known"
            )
        self.module = module
        self._available = frozenset(source.names)
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
        self.by_name: dict[str, Held] = {}
        self.by_piece: dict[str, Held] = {}
        saved_as = {key: [under_checkpoint_names(module, {name: tensor}) for name in names[key]] for key, tensor in tensors.items()}
        every = {piece for saved in saved_as.values() for pieces in saved for piece in pieces}
        # The start may be a bare model, whose names lack the prefix that the model with a head has.
        self._prefix, self._missing = differing_prefixes(source.names, every, source.label)
        for key, tensor in tensors.items():
            saved = [{self._stored(piece): part for piece, part in pieces.items()} for pieces in saved_as[key]]
            # Of tied names a checkpoint may store any.
            pieces = next((pieces for pieces in saved if self._available.issuperset(pieces)), saved[0])
            first = next(iter(pieces.values()))
            # A transposed view has other strides.
            plain = len(pieces) == 1 and (first.shape, first.stride()) == (tensor.shape, tensor.stride())
            held = Held(tuple(names[key]), tuple(pieces), plain)
            self.by_name |= dict.fromkeys(names[key], held)
            self.by_piece |= {piece: held for pieces in saved for piece in pieces}

    def _stored(self, piece: str) -> str:
        """Name in the start of what a checkpoint of the model calls so."""
        return self._prefix + piece.removeprefix(self._missing)

    def form(self, path: str) -> Form | None:
        """How peft factors the weight of a module; None if it cannot, or not so that forward and merged weights agree."""
        from transformers.pytorch_utils import Conv1D

        module = self.module.get_submodule(path)
        if isinstance(self.module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            return None
        forms: dict[type[nn.Module], Form] = {Conv1D: "turned", nn.Linear: "linear", nn.Embedding: "embedding"}
        for kind, form in forms.items():
            if isinstance(module, kind):
                # peft adds to what its own class makes of the input, not to what a child makes of it.
                return form if type(module).forward is kind.forward else None
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            # peft hands on stride and padding of a convolution, and nothing else.
            simple = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
            return "convolution" if simple else None
        return None

    def missing(self, held: Held) -> set[str]:
        """Pieces of a tensor that the start does not hold."""
        return set(held.pieces) - self._available

    def tensor(self, held: Held, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the model, put together from the pieces a checkpoint has.

        Args:
            held: Which one.
            read: Reads a piece.

        Raises:
            LataError: The pieces do not make up the tensor.
        """
        if held.plain:
            return read(held.pieces[0])
        shape = self.module.state_dict()[held.names[0]].shape
        # Where each entry goes is asked of the conversion itself: it is given the entries' positions to convert.
        positions = torch.arange(shape.numel(), dtype=torch.int64).reshape(shape)
        whole: Tensor | None = None
        filled = 0
        for piece, places in under_checkpoint_names(self.module, {held.names[0]: positions}).items():
            values = read(self._stored(piece))
            if whole is None:
                whole = torch.empty(shape, dtype=values.dtype)
            whole.view(-1)[places.reshape(-1)] = values.reshape(-1).to(whole.dtype)
            filled += places.numel()
        if whole is None or filled != shape.numel():
            raise LataError(f"{held.names[0]} cannot be put together from the tensors of a checkpoint: {first_three(held.pieces)}")
        return whole
