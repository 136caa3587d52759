"""How a stored tensor is a matrix of outputs × inputs, from names and shapes alone.

A checkpoint does not say which axis is which. Three facts tell. A bias has the length of the outputs, so the Conv1D of GPT-2, which is stored as
inputs × outputs, is known by the bias beside it. Fused experts come as a pair of gate_up_proj and down_proj, and the outputs of the second
are the inputs of the first. Everything else that transformers and torch store is outputs × inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lata_lightning.layers import LayerMap

_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """A tensor as one or several matrices that lie one after the other.

    Attributes:
        count: Number of matrices.
        outputs, inputs: Rows and columns of each.
        turned: Whether each is stored as inputs × outputs.
    """

    count: int
    outputs: int
    inputs: int
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.outputs, self.inputs


def matrix_forms(shapes: Mapping[str, tuple[int, ...]], layers: LayerMap) -> dict[str, Form]:
    """The tensors that are matrices, by name, with the form they have.

    Every tensor of two axes is one but biases, which fused experts store as a table; convolutions are outputs × everything else; fused experts are one
    matrix for each expert. No matrices are vectors, tables with a leading axis of one, and convolutions of one input channel each, whose outputs have no
    inputs in common.

    Args:
        shapes: Shape by name of all tensors of a model.
        layers: Where they belong.
    """
    turned = _turned(shapes, layers)
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or 0 in shape or name.endswith("bias"):
            continue
        if len(shape) == 2:
            outputs, inputs = reversed(shape) if name in turned else shape
            found[name] = Form(1, outputs, inputs, name in turned)
        elif len(shape) == 3 and _EXPERTS.search(name):
            outputs, inputs = reversed(shape[1:]) if name in turned else shape[1:]
            found[name] = Form(shape[0], outputs, inputs, name in turned)
        elif 1 not in shape[:2]:
            found[name] = Form(1, shape[0], math.prod(shape[1:]))
    return found


def _turned(shapes: Mapping[str, tuple[int, ...]], layers: LayerMap) -> set[str]:
    """Names of the matrices that are stored as inputs × outputs."""
    found, square = set(), set()
    for name, shape in shapes.items():
        length = shapes.get(f"{name.removesuffix('weight')}bias") if name.endswith(".weight") else None
        if len(shape) == 2 and length is not None and len(length) == 1:
            if shape[0] == shape[1] == length[0] and layers.positions[name].block is not None:
                square.add(name)
            elif length[0] == shape[1] != shape[0]:
                found.add(name)
        elif len(shape) == 3 and name.endswith("gate_up_proj"):
            other = f"{name.removesuffix('gate_up_proj')}down_proj"
            down = shapes.get(other, ())
            if len(down) == 3 and shape[1] == down[2] and shape[2] == 2 * down[1]:
                found |= {name, other}
    # Of a square one the bias says nothing; a model has all its blocks made of one kind of layer.
    if any(layers.positions[name].block is not None and len(shapes[name]) == 2 for name in found):
        found |= square
    return found
