import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lata_lightning.store.checkpoint_names import (
    checkpoint_name_of,
    checkpoint_pieces,
    ignored_on_load,
    row_major,
    state_of,
    tied_groups,
    under_checkpoint_names,
)

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "experts": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2)),
    "plain": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / "model.safetensors")


def test_tensors_of_a_model_are_named_and_split_as_transformers_saves_them(saved):
    model, stored = saved
    named = under_checkpoint_names(model, state_of(model))
    assert set(named) == set(stored)
    assert all(torch.equal(named[name], stored[name]) for name in stored)


def test_pieces_tell_where_the_entries_of_a_stored_tensor_lie_in_the_model(saved):
    model, stored = saved
    state = state_of(model)
    pieces = checkpoint_pieces(model, state)
    assert set(pieces) == set(stored)
    for name, piece in pieces.items():
        assert piece.shape == tuple(stored[name].shape)
        (origin,) = piece.origins
        assert torch.equal(state[origin].reshape(-1).as_strided(piece.shape, piece.stride, piece.offset), stored[name])
    assert checkpoint_name_of(model) == {piece.origins[0]: name for name, piece in pieces.items() if piece.whole}


def test_modules_that_are_not_of_transformers_keep_their_names():
    module = nn.Linear(2, 2)
    assert under_checkpoint_names(module, dict(module.named_parameters())).keys() == {"weight", "bias"}
    assert ignored_on_load(module, ["other"]) == set()


def test_the_state_of_a_module_has_no_marks_of_wrappers_and_every_name_of_a_tied_tensor():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    wrapped = nn.ModuleDict({"_orig_mod": module})
    assert set(state_of(wrapped)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert tied_groups(module) == [frozenset({"0.weight", "1.weight"})]


def test_strides_of_a_contiguous_tensor_are_those_of_torch():
    for shape in ((), (3,), (2, 3, 4)):
        assert row_major(shape) == torch.empty(shape).stride()
