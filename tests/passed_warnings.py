"""Warnings that tests let pass, each with the reason; all other warnings are errors."""

import pytest


def _passed(text):
    return pytest.mark.filterwarnings(f"ignore:{text}")


# Lightning advises more worker processes for loading; the data of these tests is in memory.
FEW_WORKERS = _passed(".*does not have many workers")
# torch deprecates isinstance(treespec, LeafSpec), which Lightning's loaders call.
LEAF_SPEC = _passed(".*treespec, LeafSpec")
# Data modules without validation data return an empty list of loaders, which Lightning reports.
EMPTY_LOADER = _passed("Total length of `list` across ranks is zero")
# Modules have a validation step, and most fine-tunes here no validation data.
NO_VALIDATION_LOADER = _passed("You defined a `validation_step`")
# Epochs of these tests have fewer steps than Lightning's default logging interval.
FEW_BATCHES = _passed(".*number of training batches .* smaller than the logging interval")
# A resumed run writes its checkpoints into the directory of the interrupted one.
CHECKPOINTS_EXIST = _passed(".*Checkpoint directory .* is not empty")
# peft and older releases of transformers use a name that newer releases of transformers deprecate.
GRADIENT_CHECKPOINTING = _passed(".*is_gradient_checkpointing")
# Lightning's command line calls functions that newer releases of jsonargparse deprecate.
JSONARGPARSE = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
# peft saves the weights of embeddings that an adapter trains, and reports it.
PEFT_SAVES_EMBEDDINGS = _passed("Setting `save_embedding_layers` to `True`")
# peft reports that merging an adapter of one of two tied layers unties them, and that such an adapter may be a mistake; here it is on purpose.
PEFT_UNTIES = _passed("Input and output embeddings are no longer tied after merging")
PEFT_TIED_LAYER = _passed("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
# peft reports that it corrects the orientation of a linear layer in a model whose other layers are stored as inputs × outputs.
PEFT_ORIENTATION = _passed("fan_in_fan_out is set to True but the target module is")
