"""The blocks of a model, and the module that computes each layer of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from lata_lightning.errors import LayoutMismatchError, WeightingError, first_three
from lata_lightning.layers import LayerMap, Level, layer_map
from lata_lightning.linearity.model_weights import ModelWeights

PARTS = ("attention", "cross_attention", "mlp")
"""Parts of a block that are run separately at level ``submodule``."""


class LayerModule(NamedTuple):
    """A layer, and the module that computes it.

    Attributes:
        layer: Name of the layer in the task vectors.
        part: ``block``, or one of PARTS.
        block: Name of its block in the task vectors.
        module: Path of the smallest module that has all its tensors and can be run.
        tensors: Names of its tensors in the model.
    """

    layer: str
    part: str
    block: str
    module: str
    tensors: tuple[str, ...]


class Blocks:
    """The blocks of a model, by their names in the model and in the task vectors, which may follow the names in checkpoints.

    Args:
        model: The model.
        layers: Layers of the task vectors.

    Attributes:
        names: Name of each block in the task vectors, by its path in the model, in order.
        tensors: Names of the tensors of each block in the model, by path.

    Raises:
        WeightingError: No tensor belongs to a block.
        LayoutMismatchError: A block of the model is not a block of the vectors.
    """

    def __init__(self, model: ModelWeights, layers: LayerMap) -> None:
        self._model, self._layers = model, layers
        modules = {path for path, _ in model.module.named_modules()}
        paths = layers.blocks if modules.issuperset(layers.blocks) else layer_map(model.names, structure=model.module).blocks
        tensors = {path: [name for name in model.names if name.startswith(path + ".")] for path in paths}
        self.tensors = {path: names for path, names in tensors.items() if names}
        if not self.tensors:
            raise WeightingError(
                "there is no layer to run: no tensor belongs to a block. Give the rule that names the blocks (layers=…) when extracting the vectors."
            )
        self.names = {path: self._name(path) for path in self.tensors}

    def layer_modules(self, level: Level) -> list[LayerModule]:
        """Return the layers that are run separately, in the order of the blocks.

        At level ``submodule``, a part whose tensors are in several modules, such as the MLP of BERT, is run as the block with only that part moved.
        """
        modules = []
        for path, names in self.tensors.items():
            block = self.names[path]
            if level == "block":
                modules.append(LayerModule(block, "block", block, path, tuple(names)))
                continue
            parts = {name: {self._layers.positions[other].part for other in stored} for name, stored in self._stored(names).items()}
            for part in PARTS:
                tensors = tuple(name for name in names if parts[name] == {part})
                if tensors:
                    modules.append(LayerModule(f"{block}.{part}", part, block, self._smallest_module(tensors, path), tensors))
        return modules

    def _name(self, path: str) -> str:
        blocks = {self._layers.positions[name].block for stored in self._stored(self.tensors[path]).values() for name in stored}
        if len(blocks) != 1 or None in blocks:
            raise LayoutMismatchError(
                f"the block {path} of the model must be one block of the vectors; its tensors lie in {first_three(str(block) for block in blocks)}"
            )
        return str(blocks.pop())

    def _stored(self, names: Sequence[str]) -> dict[str, set[str]]:
        """Return, for each tensor of the model, its names in the vectors."""
        return {name: stored & self._layers.positions.keys() for name, stored in self._model.stored_names(names).items()}

    def _smallest_module(self, tensors: Sequence[str], block: str) -> str:
        paths = [name.split(".")[:-1] for name in tensors]
        common = [steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))]
        while len(common) > block.count(".") + 1:
            # A ModuleList, for example, cannot be run.
            if type(self._model.module.get_submodule(".".join(common))).forward is not nn.Module.forward:
                return ".".join(common)
            common.pop()
        return block
