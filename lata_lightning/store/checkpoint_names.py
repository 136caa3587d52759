"""The names under which transformers saves the tensors of a model, which differ from those of its modules for some architectures."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lata_lightning.layers import unwrapped


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by name, without what wrappers add to names; tied ones under each of their names.

    These are the tensors in ``state_dict``. That method itself is not called, as any part of a module may override it, leave entries out and take no
    arguments.
    """
    state: dict[str, Tensor] = {}
    for path, part in nn.Module.named_modules(module, remove_duplicate=False):
        part._save_to_state_dict(state, f"{path}." if path else "", keep_vars=True)
    return {unwrapped(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def under_checkpoint_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module as a saved checkpoint would name and split them.

    Args:
        module: A transformers model; tensors of any other module keep their names.
        tensors: Parameters or buffers of the module, by the names of the module. Some become several (fused experts are saved one by one);
            nearly all of those are views, so no memory is taken.

    Returns:
        Tensors by the names that ``save_pretrained`` would write.
    """
    transformers = sys.modules.get("transformers")
    # What was never imported cannot have been used to build the module.
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(module, dict(tensors))
    return converted


class Piece(NamedTuple):
    """How a tensor in a checkpoint is made from tensors of the module.

    A checkpoint may store a tensor of the module as it is, store a view of one (an expert out of fused experts), or compute one from several.

    Attributes:
        origins: Names of the tensors of the module that it is made from.
        shape: Shape of the tensor in the checkpoint.
        stride, offset: If it is a view of one tensor of the module: strides and storage offset of that view, in entries. Otherwise None.
        whole: Whether it is one tensor of the module as it is, contiguous and of the same shape.
    """

    origins: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int | None
    whole: bool


def checkpoint_pieces(module: nn.Module, names: Collection[str]) -> dict[str, Piece]:
    """Return how a checkpoint stores tensors of a transformers model, by its names for them; nothing is read or computed.

    Args:
        module: The model; its tensors may be meta tensors.
        names: Names, in the module, of the tensors to store.
    """
    state = {name: tensor for name, tensor in state_of(module).items() if name in names}
    traced: dict[str, Tensor] = {}
    for name, tensor in state.items():
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_Traced)
        empty.origins, empty.whole = frozenset({name}), empty.untyped_storage()._cdata
        traced[name] = empty
    pieces = {}
    for name, tensor in under_checkpoint_names(module, traced).items():
        origins = tuple(sorted(getattr(tensor, "origins", ())))
        first = traced[origins[0]] if origins else None
        view = isinstance(first, _Traced) and len(origins) == 1 and tensor.untyped_storage()._cdata == first.whole
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        whole = view and first is not None and shape == tuple(first.shape) and stride == row_major(shape)
        pieces[name] = Piece(origins, shape, stride if view else None, int(tensor.storage_offset()) if view else None, whole)
    return pieces


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Traced(Tensor):
    """A meta tensor that records which tensors it was made from; copies stay views, so that their strides tell where their entries come from."""

    origins: frozenset[str]
    whole: int

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        result: Any = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        origins: frozenset[str] = frozenset()
        for tensor in _tensors_in(args):
            origins |= getattr(tensor, "origins", frozenset())
        for tensor in _tensors_in(result):
            tensor.origins = origins
        return result


def _tensors_in(values: Any) -> list[_Traced]:
    if isinstance(values, _Traced):
        return [values]
    return [tensor for value in values for tensor in _tensors_in(value)] if isinstance(values, list | tuple) else []


def loading_names(module: nn.Module) -> Callable[[str], str]:
    """Return the function from a name in a checkpoint to the name in the model that loads it, for tensors that are only renamed."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not isinstance(module, transformers.PreTrainedModel):
        return lambda name: name
    model: Any = module
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def loaded(name: str) -> str:
        key = str(rename_source_key(name, renamings, [], prefix, state)[0])
        return key if key in state else str(rename_source_key(name, [], [], prefix, state)[0])

    return loaded


def ignored_on_load(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that transformers silently ignores when it loads a checkpoint, as those of modules that only training had.

    Args:
        module: The model; one that is not of transformers ignores nothing.
        names: Names in the checkpoint.
    """
    import transformers

    if not isinstance(module, transformers.PreTrainedModel):
        return set()
    own, patterns = module.state_dict(), module._keys_to_ignore_on_load_unexpected or ()
    return {name for name in names if name not in own and any(re.search(pattern, name) for pattern in patterns)}


def tied_groups(module: nn.Module) -> list[frozenset[str]]:
    """Return the groups of names that are one tensor of a module."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state_of(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return [frozenset(names) for names in groups.values() if len(names) > 1]


def checkpoint_name_of(module: nn.Module) -> dict[str, str]:
    """Return the name in a checkpoint by the name in the module, for the tensors that a checkpoint stores as they are."""
    return {piece.origins[0]: name for name, piece in checkpoint_pieces(module, state_of(module)).items() if piece.whole}
