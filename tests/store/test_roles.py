import pytest
import torch
from torch import nn

from lata_lightning.store.roles import buffer_names, is_counter, is_variance, named_role, roles_of

ROLES = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": "table",
    "embeddings.position_ids": "table",
    "transformer.h.0.attn.masked_bias": "table",
    "stages.0.bn.running_mean": "state",
    "stages.0.bn.running_var": "state",
    "stages.0.bn.num_batches_tracked": "state",
    "model.layers.0.mlp.up_proj.weight": "weight",
    "cls_token": None,
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_a_name_tells_the_role_of_a_tensor_or_leaves_it_open(name, role):
    assert named_role(name, (3,), torch.float32) == role


def test_a_bias_of_attention_is_a_causal_mask_only_with_four_axes():
    assert named_role("transformer.h.0.attn.bias", (1, 1, 8, 8), torch.uint8) == "table"
    assert named_role("transformer.h.0.attn.bias", (8,), torch.float32) == "weight"


def test_buffers_of_a_module_are_no_weights_whatever_their_names():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    module.register_buffer("weight", torch.ones(2))
    module.register_buffer("unsaved", torch.ones(2), persistent=False)
    assert buffer_names(module) == {"0.running_mean", "0.running_var", "0.num_batches_tracked", "weight"}
    tensors = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()]
    roles = roles_of(tensors, [module])
    assert roles["weight"] == "state"
    assert roles["1.weight"] == roles["0.weight"] == "weight"


def test_tensors_of_unknown_role_are_weights_if_they_are_floating_and_integers_otherwise():
    assert roles_of([("a", (2,), torch.float16), ("b", (2,), torch.int64)]) == {"a": "weight", "b": "integers"}


def test_counters_and_variances_of_batch_norms_are_told_by_name():
    assert is_counter("bn.num_batches_tracked")
    assert not is_counter("bn.running_var")
    assert is_variance("bn.running_var")
    assert not is_variance("bn.running_mean")
