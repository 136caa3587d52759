"""Peft's own merge of one layer, for adapters whose change is not a sum of products of factors."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lata_lightning.errors import LataError

KINDS = frozenset({
    "LORA", "LOHA", "LOKR", "GRALORA", "HIRA", "IA3", "ADALORA", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA", "MISS", "C3A", "VBLORA",
    "LN_TUNING", "TRAINABLE_TOKENS",
})  # fmt: skip
"""The kinds of adapters whose reading is compared with ``merge_and_unload`` in the tests."""


def merged_parameters(layer: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the base parameters of an adapted layer as ``merge_and_unload`` would leave them, in float64.

    Peft's own ``merge`` runs on a copy of the layer, so the formula of each kind of adapter is that of peft.

    Args:
        layer: An unmerged peft layer, whose active adapters are to be merged. Its base parameters may be meta tensors; it does not change.
        values: The base parameters by their name in the base layer, of any floating dtype.

    Returns:
        The merged parameters, under the same names.

    Raises:
        LataError: Peft cannot merge the layer, or the layer lacks tensors that the merge needs.
    """
    if layer.merged:
        raise LataError(f"the adapters of this {type(layer).__name__} were merged after it was opened; call unmerge_adapter() first")
    # Parameters that are replaced below need not be copied.
    replaced = (parameter for name, parameter in layer.get_base_layer().named_parameters(recurse=False) if name in values)
    own = deepcopy(layer, {id(parameter): parameter for parameter in replaced})
    for name, value in values.items():
        own.get_base_layer().register_parameter(name, nn.Parameter(value.to(torch.float64, copy=True), requires_grad=False))
    try:
        with torch.no_grad():
            own.double().merge(safe_merge=False)
    except Exception as error:
        # Each kind of adapter refuses in its own way.
        raise LataError(f"peft cannot merge this {type(layer).__name__}: {' '.join(str(error).split())}") from error
    merged = {name: parameter.detach() for name, parameter in own.get_base_layer().named_parameters(recurse=False) if name in values}
    if set(merged) != set(values) or any(tensor.is_meta for tensor in merged.values()):
        raise LataError(f"peft does not merge this {type(layer).__name__}, or the adapter's file lacks tensors that the merge needs")
    return merged
