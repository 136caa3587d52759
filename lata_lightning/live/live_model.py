"""The model inside a LightningModule, as a source of named tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lata_lightning.errors import LataError, first_three
from lata_lightning.layers import unwrapped
from lata_lightning.live.placements.mesh import MeshStrategy
from lata_lightning.live.placements.placement import Placement, Strategy, by_template
from lata_lightning.live.placements.replicated import Replicated
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.checkpoint_names import under_checkpoint_names
from lata_lightning.store.lora import peft_kinds
from lata_lightning.store.names import NOTHING, LeaveOut
from lata_lightning.store.roles import named_role
from lata_lightning.store.sources import Origin, TensorSource
from lata_lightning.store.tied_names import TiedNames, ties_of

_Named = TypeVar("_Named")


class LiveModel(TensorSource):
    """Floating parameters and persistent buffers of a module in training, under the names its checkpoint would have.

    Tied tensors appear once, under their first name; what wrappers add to names is taken off (see ``unwrapped``). ``read`` gives the tensor as it
    stands, on its device and without a copy, so what it returns changes with the next optimizer step. (Where a checkpoint stores in pieces what the
    module holds as one, some pieces are copies: look at the model anew before each measurement.)

    Args:
        module: The model.
        leave_out: Tells of a name whether its tensor is left out.
        strategy: How its parameters are spread over the processes.
        plain_name: Gives the name that a checkpoint has for one in the module; None for what is no tensor of the model, such as a factor of an adapter.
    """

    def __init__(
        self,
        module: nn.Module,
        leave_out: LeaveOut = NOTHING,
        strategy: Strategy | None = None,
        plain_name: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        strategy = strategy or MeshStrategy()
        parameters = _renamed({unwrapped(name): parameter for name, parameter in nn.Module.named_parameters(module)}, plain_name)
        _check_measurable({name: parameter for name, parameter in parameters.items() if not leave_out(name)})
        # Lazy parameters get a shape in the first forward pass, which may be run in a hook of the module.
        lazy = any(is_lazy(parameter) for name, parameter in parameters.items() if not leave_out(name))
        placements: dict[str, Placement] = {}
        if not lazy:
            buffers = {unwrapped(name): Replicated(buffer) for name, buffer in _persistent_buffers(module) if buffer.is_floating_point()}
            placements = _renamed({**strategy.parameters(module), **buffers}, plain_name)
        self._take(module, placements, leave_out, strategy)

    def _take(self, module: nn.Module, placements: Mapping[str, Placement], leave_out: LeaveOut, strategy: Strategy) -> None:
        """Hold these tensors of a module, named as the module names them."""
        self.module, self._strategy = module, strategy
        config = getattr(module, "config", None)
        settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
        # Transformers notes here what the weights were loaded from.
        super().__init__(Origin(getattr(config, "_name_or_path", None) or None, config=settings))
        self._by_module_name = dict(placements)
        named = under_checkpoint_names(module, {name: placement.template for name, placement in placements.items()})
        whole = by_template(placements)
        # Templates of placements that are not replicated have no values to be split.
        divided = {name: placement.template for name, placement in placements.items() if not placement.replicated}
        cut = [name for name, tensor in under_checkpoint_names(module, divided).items() if id(tensor) not in whole] if divided else []
        if cut:
            raise LataError(
                f"LATACallback cannot measure {first_three(cut)} while sharded: a checkpoint stores them in other pieces than the module. Leave them out "
                "(leave_out=[…]), or train without the callback, save the model, and take the vector from that: lata extract START MODEL --output VECTOR"
            )
        buffers = {name: placement.template for name, placement in placements.items() if placement.is_buffer}
        buffer_names = frozenset(under_checkpoint_names(module, buffers))
        # Tables that the model computes by itself, as older releases save them.
        tables = {name for name in buffer_names if named_role(name, tuple(named[name].shape), named[name].dtype) == "table"}
        every = {name: whole.get(id(tensor)) or Replicated(tensor) for name, tensor in named.items()}
        self._placements = {name: placement for name, placement in every.items() if name not in tables and not leave_out(name)}
        self.left_out: Mapping[str, Placement] = {name: placement for name, placement in every.items() if leave_out(name)}
        """The tensors that are neither followed nor measured, by name."""
        self.buffers = buffer_names & self._placements.keys()
        """Names of the tensors that are no parameters: they are followed, and not measured."""
        self._names = tuple(self._placements)
        self.index = {name: number for number, name in enumerate(self._names)}
        self._changing: tuple[tuple[bool, ...], tuple[str, ...]] | None = None

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    @override
    def label(self) -> str:
        """Not where it was loaded from: a message may tell the model from what lies there."""
        return "the model in training"

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self._placements[name].shape

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._placements[name].dtype

    @override
    def read(self, name: str) -> Tensor:
        """Return a tensor that lies whole on this process, on its device and without a copy.

        Raises:
            LataError: Other processes have parts of it.
        """
        placement = self._placements[name]
        if not placement.region.is_whole:
            raise LataError(f"{name} is spread over the processes, and cannot be read on one of them")
        return placement.values().reshape(placement.shape)

    def placement(self, name: str) -> Placement:
        """Return what this process has of a tensor."""
        return self._placements[name]

    @property
    def placements(self) -> Mapping[str, Placement]:
        """What this process has of each tensor."""
        return self._placements

    def ties(self, names: Container[str]) -> TiedNames:
        """Return the groups of names that are one tensor, as a checkpoint has them, each with at least one of the given names."""
        return ties_of(self.module, names, self._strategy.ties(self.module))

    @property
    def changing(self) -> tuple[str, ...]:
        """Names of the tensors that training can change now: parameters that ask for gradients, and buffers."""
        flags = tuple(placement.changes for placement in self._by_module_name.values())
        # Asked for before every batch, and nearly always the same as before the last one.
        if self._changing is None or self._changing[0] != flags:
            pairs = zip(self._by_module_name.items(), flags, strict=True)
            named = under_checkpoint_names(self.module, {name: placement.template for (name, placement), flag in pairs if flag})
            self._changing = (flags, tuple(name for name in self._names if name in named))
        return self._changing[1]

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter adds to; none here."""
        return frozenset()

    def added(self, name: str) -> LowRank:
        """What adapters add to a tensor."""
        raise KeyError(name)

    @property
    def quantised(self) -> frozenset[str]:
        """Names of the tensors whose values are packed away; none here."""
        return frozenset()

    def bits(self, name: str) -> Tensor:
        """The local values of a tensor as they are held."""
        return self._placements[name].values()

    @property
    def materialized(self) -> bool:
        """Whether there are weights at all: not before ``configure_model`` has built them, not on the meta device."""
        return bool(self._placements) and all(
            placement.materialized for name, placement in self._placements.items() if name not in self.quantised
        )


def _renamed(tensors: Mapping[str, _Named], plain_name: Callable[[str], str | None]) -> dict[str, _Named]:
    """Tensors by the name that a function gives for theirs, without those for which it gives none."""
    named = ((plain_name(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _check_measurable(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are no floating numbers.

    Raises:
        LataError: There are some; the message tells quantised weights from other integers and from complex numbers.
    """
    other = {name: parameter for name, parameter in parameters.items() if not parameter.is_floating_point()}
    if not other:
        return
    listed = first_three(f"{name} ({str(parameter.dtype).removeprefix('torch.')})" for name, parameter in other.items())
    if any(parameter.is_complex() for parameter in other.values()):
        advice = "Hold complex ones as pairs of real numbers (torch.view_as_real), or leave them out: leave_out=[…]."
    else:
        advice = (
            "If the model is quantised, train it in full or half precision, or LoRA on top of it. Integers that are no weights, such as indices, should "
            "be buffers, or be left out: leave_out=[…]."
        )
    raise LataError(f"LATACallback measures parameters of floating numbers, and these are none: {listed}. {advice}")


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint of the module holds, each once, under its first name."""
    # Methods of nn.Module are called, as those of the module may be overridden and need not take arguments.
    persistent = {
        f"{path}.{name}".removeprefix(".")
        for path, part in module.named_modules()
        for name, _ in nn.Module.named_buffers(part, recurse=False)
        if name not in part._non_persistent_buffers_set
    }
    return ((name, buffer) for name, buffer in nn.Module.named_buffers(module) if name in persistent)


def find_model(module: nn.Module, name: str | None = None) -> nn.Module:
    """Return the model to follow inside a LightningModule.

    Args:
        module: The LightningModule.
        name: Path of the model inside of it, such as ``"model"``; None to look for it.

    Returns:
        The outermost peft model if there is one, else the outermost transformers model, else the outermost GPT of LitGPT, else the module in its wrappers.

    Raises:
        LataError: There is nothing under that name, or there are two such models side by side.
    """
    if name is not None:
        try:
            named = module.get_submodule(name)
        except AttributeError as error:
            children = [child for child, _ in module.named_children()]
            raise LataError(f"the LightningModule has no submodule {name!r}; its children are {children}") from error
        return _inside_wrappers(named)
    for kinds in (peft_kinds(), _transformers_kinds(), _litgpt_kinds()):
        models: dict[str, nn.Module] = {}
        for path, candidate in module.named_modules():
            if isinstance(candidate, kinds) and not any(path.startswith(outer + ".") or outer == "" for outer in models):
                models[unwrapped(path)] = candidate
        if len(models) > 1:
            raise LataError(
                f"the LightningModule holds several models, {first_three(models)}; say which one is meant, such as model={min(models)!r}"
            )
        if models:
            return next(iter(models.values()))
    return _inside_wrappers(module)


def _inside_wrappers(module: nn.Module) -> nn.Module:
    """Return the module in the wrappers of DDP, Fabric, torch.compile and activation checkpointing; any other module itself."""
    while True:
        children = list(module.named_children())
        if isinstance(module, _wrapper_kinds()):
            module = module.module
        elif len(children) == 1 and not unwrapped(children[0][0]):
            module = children[0][1]
        else:
            return module


def _wrapper_kinds() -> tuple[Any, ...]:
    fabric = sys.modules.get("lightning.fabric.wrappers")
    return (nn.parallel.DistributedDataParallel, nn.DataParallel, *(() if fabric is None else (fabric._FabricModule,)))


def _litgpt_kinds() -> tuple[Any, ...]:
    litgpt = sys.modules.get("litgpt.model")
    return () if litgpt is None else (litgpt.GPT,)


def _transformers_kinds() -> tuple[Any, ...]:
    transformers = sys.modules.get("transformers")
    return (transformers.PreTrainedModel,) if transformers is not None else ()
