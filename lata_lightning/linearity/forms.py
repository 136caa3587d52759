"""The axes of stored matrices, outputs × inputs, from names and shapes alone.

A checkpoint does not say which axis is which, but it follows from three facts. A bias has the length of the outputs, so the Conv1D of GPT-2, which is
stored as inputs × outputs, is recognised by its bias. Fused experts are a pair of gate_up_proj and down_proj, and the outputs of the second are the inputs
of the first. Everything else that transformers and torch store is outputs × inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lata_lightning.layers import LayerMap

_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class MatrixForm:
    """A tensor as one matrix, or as several matrices one after the other.

    Attributes:
        count: Number of matrices.
        outputs, inputs: Rows and columns of each.
        turned: Whether they are stored as inputs × outputs.
    """

    count: int
    outputs: int
    inputs: int
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.outputs, self.inputs


def matrix_forms(shapes: Mapping[str, tuple[int, ...]], layers: LayerMap) -> dict[str, MatrixForm]:
    """Return the form of every tensor that is a matrix, by name.

    Every tensor of two axes is a matrix, except biases, which fused experts store as a table. Convolutions are outputs × everything else. Fused experts
    are one matrix for each expert. Vectors, tensors with a leading axis of one, and depthwise convolutions, whose outputs share no inputs, are not
    matrices.

    Args:
        shapes: Shapes of all tensors of a model, by name.
        layers: Layers of the tensors.
    """
    turned = _turned(shapes, layers)
    forms = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or 0 in shape or name.endswith("bias"):
            continue
        if len(shape) == 2:
            outputs, inputs = reversed(shape) if name in turned else shape
            forms[name] = MatrixForm(1, outputs, inputs, name in turned)
        elif len(shape) == 3 and _EXPERTS.search(name):
            outputs, inputs = reversed(shape[1:]) if name in turned else shape[1:]
            forms[name] = MatrixForm(shape[0], outputs, inputs, name in turned)
        elif 1 not in shape[:2]:
            forms[name] = MatrixForm(1, shape[0], math.prod(shape[1:]))
    return forms


def _turned(shapes: Mapping[str, tuple[int, ...]], layers: LayerMap) -> set[str]:
    """Return the names of the matrices that are stored as inputs × outputs."""
    turned, square = set(), set()
    for name, shape in shapes.items():
        length = shapes.get(f"{name.removesuffix('weight')}bias") if name.endswith(".weight") else None
        if len(shape) == 2 and length is not None and len(length) == 1:
            if shape[0] == shape[1] == length[0] and layers.positions[name].block is not None:
                square.add(name)
            elif length[0] == shape[1] != shape[0]:
                turned.add(name)
        elif len(shape) == 3 and name.endswith("gate_up_proj"):
            other = f"{name.removesuffix('gate_up_proj')}down_proj"
            down = shapes.get(other, ())
            if len(down) == 3 and shape[1] == down[2] and shape[2] == 2 * down[1]:
                turned |= {name, other}
    # The bias of a square matrix says nothing, but all blocks of a model are made of the same kind of layer.
    if any(layers.positions[name].block is not None and len(shapes[name]) == 2 for name in turned):
        turned |= square
    return turned
