"""The modules that the tensors of a checkpoint belong to, and how peft can adapt them."""

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

AdapterForm = Literal["linear", "turned", "embedding", "convolution"]


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a model.

    Attributes:
        names: All its names in the model; several where weights are tied.
        stored_names: Its names in a checkpoint; several where it is stored as several tensors, such as the experts of a mixture.
        plain: Whether it is stored as one tensor of its own shape.
    """

    names: tuple[str, ...]
    stored_names: tuple[str, ...]
    plain: bool

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that it belongs to."""
        return tuple(name.rpartition(".")[0] for name in self.names)


class Structure:
    """The meta model of a config, and the modules that the tensors of a checkpoint belong to.

    Attributes:
        module: The model, with meta tensors.
        by_name: The tensors of the model, by each of their names in the model.
        by_stored_name: The same, by each of their names in a checkpoint.

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
        self.by_name: dict[str, ModelTensor] = {}
        self.by_stored_name: dict[str, ModelTensor] = {}
        saved_as = {key: [under_checkpoint_names(module, {name: tensor}) for name in names[key]] for key, tensor in tensors.items()}
        every = {name for saved in saved_as.values() for parts in saved for name in parts}
        # The start may be a model without a head, whose names lack the prefix of the model with a head.
        self._prefix, self._missing = differing_prefixes(source.names, every, source.label)
        for key, tensor in tensors.items():
            saved = [{self._stored(name): part for name, part in parts.items()} for parts in saved_as[key]]
            # A checkpoint may store a tied tensor under any of its names.
            parts = next((parts for parts in saved if self._available.issuperset(parts)), saved[0])
            first = next(iter(parts.values()))
            # A transposed view has other strides.
            plain = len(parts) == 1 and (first.shape, first.stride()) == (tensor.shape, tensor.stride())
            entry = ModelTensor(tuple(names[key]), tuple(parts), plain)
            self.by_name |= dict.fromkeys(names[key], entry)
            self.by_stored_name |= {name: entry for parts in saved for name in parts}

    def _stored(self, name: str) -> str:
        """Return the name in the start of a tensor, from its name in a checkpoint of the model."""
        return self._prefix + name.removeprefix(self._missing)

    def form(self, path: str) -> AdapterForm | None:
        """Return how peft factors the weight of a module; None if it cannot, or if its forward pass would differ from the merged weights."""
        from transformers.pytorch_utils import Conv1D

        module = self.module.get_submodule(path)
        if isinstance(self.module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            return None
        forms: dict[type[nn.Module], AdapterForm] = {Conv1D: "turned", nn.Linear: "linear", nn.Embedding: "embedding"}
        for kind, form in forms.items():
            if isinstance(module, kind):
                # peft calls the forward method of the class it knows, not that of a subclass.
                return form if type(module).forward is kind.forward else None
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            # peft copies stride and padding of a convolution, and nothing else.
            simple = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
            return "convolution" if simple else None
        return None

    def missing(self, tensor: ModelTensor) -> set[str]:
        """Return the stored names of a tensor that the start lacks."""
        return set(tensor.stored_names) - self._available

    def read(self, tensor: ModelTensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return a tensor of the model, assembled from the tensors of a checkpoint.

        Args:
            tensor: The tensor.
            read: Reads a tensor of the checkpoint.

        Raises:
            LataError: The tensors of the checkpoint do not make up the whole tensor.
        """
        if tensor.plain:
            return read(tensor.stored_names[0])
        shape = self.module.state_dict()[tensor.names[0]].shape
        # The conversion is applied to the indices of the entries, which then say where each stored entry goes.
        positions = torch.arange(shape.numel(), dtype=torch.int64).reshape(shape)
        whole: Tensor | None = None
        filled = 0
        for name, indices in under_checkpoint_names(self.module, {tensor.names[0]: positions}).items():
            values = read(self._stored(name))
            if whole is None:
                whole = torch.empty(shape, dtype=values.dtype)
            whole.view(-1)[indices.reshape(-1)] = values.reshape(-1).to(whole.dtype)
            filled += indices.numel()
        if whole is None or filled != shape.numel():
            raise LataError(
                f"{tensor.names[0]} cannot be put together from the tensors of a checkpoint: {first_three(tensor.stored_names)}"
            )
        return whole
