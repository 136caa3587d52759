import pytest
import torch
from tiny_models import llama
from torch import nn

from lata_lightning.errors import SourceError
from lata_lightning.store.meta_model import copy_without_weights, meta_model, model_without_weights


def config_of(model):
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def test_a_config_gives_its_model_without_any_memory_for_weights():
    model = meta_model(config_of(llama()))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"architectures": []},
        {"architectures": ["NoSuchModel"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "model_type": "no-such-type"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "code.Model"}},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "wide"},
        {"architectures": ["BertModel"], "model_type": "llama"},
        {"architectures": ["pipeline"], "model_type": "llama"},
        {"architectures": ["AutoConfig"], "model_type": "llama"},
        {"architectures": [3], "model_type": "llama"},
    ],
)
def test_a_config_that_transformers_cannot_build_gives_no_model_and_no_error(config):
    assert meta_model(config) is None


def test_a_model_without_weights_has_the_values_of_its_buffers():
    model = llama()
    built = model_without_weights(config_of(model), "start")
    assert all(parameter.is_meta for parameter in built.parameters())
    buffers = dict(built.named_buffers())
    assert buffers
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())
    assert not built.training


def test_building_a_model_without_weights_leaves_no_trace_in_torch():
    model_without_weights(config_of(llama()), "start")
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_copy_without_weights_shares_nothing_with_the_module():
    module = nn.BatchNorm1d(3).train()
    built = copy_without_weights(module)
    built.running_mean.add_(1)
    assert built.weight.is_meta
    assert not module.weight.is_meta
    assert module.running_mean.eq(0).all()
    assert (module.training, built.training) == (True, False)


@pytest.mark.parametrize("config", [None, {}, {"architectures": ["NoSuchModel"], "model_type": "llama"}])
def test_a_config_that_describes_no_known_model_is_refused(config):
    with pytest.raises(SourceError, match="start does not say which model to run"):
        model_without_weights(config, "start")
