"""Which parameters of a model are the projections of its attention: the matrices that make queries, keys, values and the output."""

from __future__ import annotations

import re

from torch import nn

from lata_lightning.layers import layer_map, part_of, unwrapped

_ATTENTION_PARTS = ("attention", "cross_attention")
# Words of a name, between underscores, that say a tensor makes queries, keys, values or the output; fused ones and low-rank factors included.
_PROJECTION = re.compile(
    r"q|k|v|o|qk|kv|qkv|qkvz|wq|wk|wv|wo|wqkv|query|key|value|queries|keys|values|out|output|dense|post", re.IGNORECASE
)
# Whole names that say so only inside attention.
_PROJECTION_NAME = re.compile(
    r"c_attn|c_proj|att_proj|attn_proj|in_proj|proj|proj_out|projection|projection_layer|vision_proj|text_proj", re.IGNORECASE
)
# Words that say a tensor inside attention does something else: positions, gates, norms, sparse selection, short convolutions, a block of its own.
_ELSE = re.compile(
    r"pos|position|relative|rel|distance|gate|g|indexer|sinks?|norm|layernorm|ln|bias|emb|embed|embedding|time|conv|conv1d|sr|reduction|"
    r"mlp|ffn|fc|intermediate|router",
    re.IGNORECASE,
)
_SINGLE = re.compile(r"w?[qkvo]", re.IGNORECASE)
# Modules that wrap one linear map give its weight a name of its own.
_WRAPPED = ("linear",)


def attention_projections(model: nn.Module, *, train_bias: bool = False) -> dict[str, nn.Parameter]:
    """Return the weight matrices Wq, Wk, Wv and Wo of all attention in a model.

    Separate and fused layouts, linear modules, ``Conv1D`` and ``torch.nn.MultiheadAttention``, grouped queries, low-rank factors and
    cross-attention count alike, in every tower of the model. Norms, position tables and biases, gates, sinks and routers inside attention are
    no projections; neither is the attention of a pooling head.

    Args:
        model: Any module; meta tensors suffice. Its parameters are returned, not copied, and nothing changes.
        train_bias: Whether the biases that belong to the matrices come along.

    Returns:
        Parameters by their name in ``model`` (without what wrappers add to it), in the order of the model; each once, under its first
        name. Empty for a model without attention.

    Source: arXiv:2407.07089.
    """
    parameters = {
        unwrapped(f"{path}.{leaf}".removeprefix(".")): (owner, parameter)
        for path, owner in model.named_modules()
        for leaf, parameter in owner.named_parameters(recurse=False)
    }
    positions = layer_map(parameters, structure=model).positions
    modules = {unwrapped(path): module for path, module in model.named_modules()}
    projections: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, (owner, parameter) in parameters.items():
        block, part = positions[name]
        if block is None and part == "other":
            # Attention outside of any numbered list.
            block, part = "", part_of(name, "", modules)
        if part in _ATTENTION_PARTS and block is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            below = name.removeprefix(f"{block}.").split(".")
            if not isinstance(owner, nn.Embedding) and _is_projection(below, parameter, train_bias=train_bias):
                projections[name] = parameter
    return projections


def _is_projection(path: list[str], parameter: nn.Parameter, *, train_bias: bool) -> bool:
    """Whether a tensor, by its path below its block, is the matrix of a projection, or the bias of one if that is wanted."""
    *above, leaf = path
    is_bias = leaf.endswith("bias")
    if is_bias and not train_bias:
        return False
    if not is_bias and parameter.ndim < 2:
        return False
    if leaf in ("weight", "bias"):
        name = above.pop() if above else ""
        if name in _WRAPPED and above:
            name = above.pop()
    elif leaf.endswith(("_weight", "_bias")):
        name = leaf.rpartition("_")[0]
    elif _SINGLE.fullmatch(leaf):
        name = leaf
    else:
        return False
    words = name.split("_")
    if any(_ELSE.fullmatch(word) for component in [*above, name] for word in component.split("_")):
        return False
    return _PROJECTION_NAME.fullmatch(name) is not None or any(_PROJECTION.fullmatch(word) for word in words)
