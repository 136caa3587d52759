"""The names under which transformers saves the tensors of a model, which for some architectures are not those of its modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn


def under_checkpoint_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a module as a saved checkpoint would name and split them.

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
