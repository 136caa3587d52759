import pytest
import torch
import transformers
from linear_models import Chain
from safetensors.torch import load_file
from tiny_models import llama
from torch import nn

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.linearity.model_weights import ModelWeights
from lata_lightning.store.meta_model import copy_without_weights

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_filled_with_stored_weights_computes_what_the_original_computes(tied):
    model = llama(tied=tied).eval()
    stored = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    weights = ModelWeights(copy_without_weights(model))
    weights.put(weights.fill(weights.names, stored.get, "start"))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(weights.module(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_local_experts": 2}),
        (
            "ViTModel",
            "ViTConfig",
            {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8},
        ),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    ],
)
def test_tensors_saved_under_other_names_or_in_parts_are_converted_back(model, config, settings, tmp_path):
    original = getattr(transformers, model)(getattr(transformers, config)(**settings))
    original.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = ModelWeights(copy_without_weights(original))
    filled = weights.fill(weights.names, stored.get, "start")
    assert set(filled) == set(dict(original.named_parameters()))
    assert all(torch.equal(filled[name], parameter) for name, parameter in original.named_parameters())
    names = weights.stored_names(weights.names)
    assert set().union(*names.values()) == set(stored)
    assert all(names.values())


def test_experts_are_stored_as_several_tensors():
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    names = ModelWeights(copy_without_weights(model)).stored_names(["model.layers.1.mlp.experts.gate_up_proj"])
    assert names["model.layers.1.mlp.experts.gate_up_proj"] == {
        f"model.layers.1.block_sparse_moe.experts.{expert}.{piece}.weight" for expert in (0, 1) for piece in ("w1", "w3")
    }


def test_a_buffer_that_is_not_stored_keeps_its_value():
    weights = ModelWeights(copy_without_weights(nn.BatchNorm1d(3)))
    assert set(weights.fill(weights.names, {"weight": torch.ones(3), "bias": torch.ones(3)}.get, "start")) == {"weight", "bias"}


def test_what_cannot_be_filled_is_named():
    weights = ModelWeights(copy_without_weights(Chain()))
    with pytest.raises(LayoutMismatchError, match=r"start must hold all tensors that the model needs; missing are 4: \['blocks.0.bias'"):
        weights.fill(weights.names, lambda name: None, "start")
    with pytest.raises(LayoutMismatchError, match=r"blocks.0.weight of start has the shape \(2,\), and the model needs \(4, 4\)"):
        weights.fill(weights.names, lambda name: torch.ones(2), "start")
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    weights = ModelWeights(copy_without_weights(model))
    with pytest.raises(LayoutMismatchError, match=r"missing are 2: \['model.layers.0.block_sparse_moe.experts.0.w2.weight'"):
        weights.fill(["model.layers.0.mlp.experts.down_proj"], lambda name: None, "start")
