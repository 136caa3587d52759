"""Which module of the model computes which layer of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from lata_lightning.errors import LayoutMismatchError, WeightingError, first_three
from lata_lightning.layers import LayerMap, Level, layer_map
from lata_lightning.linearity.shell import Shell

PARTS = ("attention", "cross_attention", "mlp")
"""Parts of a block that are run by themselves at level ``submodule``."""


class Unit(NamedTuple):
    """A layer, and the module that computes it.

    Attributes:
        layer: Its name in the task vectors.
        part: ``block``, or one of PARTS.
        block: Name of its block in the task vectors.
        module: Path of the smallest module that holds all its tensors and can be run.
        tensors: Names of its tensors in the model.
    """

    layer: str
    part: str
    block: str
    module: str
    tensors: tuple[str, ...]


class Blocks:
    """The blocks of a model in its own names, and in those of the task vectors where these follow the names in checkpoints.

    Args:
        shell: The model.
        layers: Of the task vectors.

    Attributes:
        names: Name of each block in the task vectors, by its path in the model, in order.
        tensors: Names of the tensors of each block in the model, by path.

    Raises:
        WeightingError: No tensor belongs to a block.
        LayoutMismatchError: A block of the model is no block of the vectors.
    """

    def __init__(self, shell: Shell, layers: LayerMap) -> None:
        self._shell, self._layers = shell, layers
        modules = {path for path, _ in shell.model.named_modules()}
        paths = layers.blocks if modules.issuperset(layers.blocks) else layer_map(shell.names, structure=shell.model).blocks
        held = {path: [name for name in shell.names if name.startswith(path + ".")] for path in paths}
        self.tensors = {path: names for path, names in held.items() if names}
        if not self.tensors:
            raise WeightingError(
                "there is no layer to run: no tensor belongs to a block. Give the rule that names the blocks (layers=…) when extracting the vectors."
            )
        self.names = {path: self._name(path) for path in self.tensors}

    def units(self, level: Level) -> list[Unit]:
        """The layers that are run by themselves, blocks in order.

        At level ``submodule``, a part whose tensors stand in several modules, as the MLP of BERT, is run as the block with only that part moved.
        """
        found = []
        for path, names in self.tensors.items():
            block = self.names[path]
            if level == "block":
                found.append(Unit(block, "block", block, path, tuple(names)))
                continue
            parts = {name: {self._layers.positions[stored].part for stored in kept} for name, kept in self._kept(names).items()}
            for part in PARTS:
                held = tuple(name for name in names if parts[name] == {part})
                if held:
                    found.append(Unit(f"{block}.{part}", part, block, self._smallest_module(held, path), held))
        return found

    def _name(self, path: str) -> str:
        found = {self._layers.positions[kept].block for stored in self._kept(self.tensors[path]).values() for kept in stored}
        if len(found) != 1 or None in found:
            raise LayoutMismatchError(
                f"the block {path} of the model must be one block of the vectors; its tensors lie in {first_three(str(block) for block in found)}"
            )
        return str(found.pop())

    def _kept(self, names: Sequence[str]) -> dict[str, set[str]]:
        """By tensor of the model, the names under which the vectors hold it."""
        return {name: stored & self._layers.positions.keys() for name, stored in self._shell.stored_names(names).items()}

    def _smallest_module(self, tensors: Sequence[str], block: str) -> str:
        paths = [name.split(".")[:-1] for name in tensors]
        common = [steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))]
        while len(common) > block.count(".") + 1:
            # Lists and the like cannot be run.
            if type(self._shell.model.get_submodule(".".join(common))).forward is not nn.Module.forward:
                return ".".join(common)
            common.pop()
        return block
