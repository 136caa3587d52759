import warnings

import peft
import pytest
import torch
from adapter_models import noise_on
from torch import nn

from lata_lightning.errors import LataError
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.store.adapter_layers import (
    changed_parameters,
    check_kind,
    check_layer,
    factors_of,
    is_plain_lora,
    is_tuner,
    kind_of,
    weight_shape,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.embedding, self.convolution = nn.Linear(4, 6), nn.Embedding(5, 4), nn.Conv2d(3, 2, 2)


def layer(name, config=peft.LoraConfig, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Small(), config(target_modules=[name], **options))
    noise_on(model, 1)
    return model.get_base_model().get_submodule(name)


@pytest.mark.parametrize("name", ["linear", "embedding", "convolution"])
def test_factors_multiply_to_what_peft_itself_adds_to_the_weight(name):
    adapted = layer(name, r=2, lora_alpha=3)
    found = LowRank(weight_shape(adapted), (factors_of(adapted, "default"),))
    torch.testing.assert_close(found.dense(), adapted.get_delta_weight("default").float(), rtol=1e-6, atol=1e-7)
    assert weight_shape(adapted) == tuple(adapted.get_base_layer().weight.shape)


def test_plain_lora_is_told_from_dora_from_biases_and_from_other_kinds():
    assert is_plain_lora(layer("linear"))
    kinds = {
        "DoRA": layer("linear", use_dora=True),
        "LoRA with a bias": layer("linear", lora_bias=True),
        "loha": layer("linear", peft.LoHaConfig),
        "ia3": layer("linear", peft.IA3Config, feedforward_modules=[]),
    }
    for kind, adapted in kinds.items():
        assert not is_plain_lora(adapted)
        assert kind_of(adapted) == kind
        assert is_tuner(adapted)
    assert not is_tuner(nn.Linear(2, 2))


def test_lora_changes_the_weight_and_with_a_bias_of_its_own_also_the_bias():
    assert [name for name, _ in changed_parameters(layer("linear"))] == ["weight"]
    assert [name for name, _ in changed_parameters(layer("linear", lora_bias=True))] == ["weight", "bias"]
    assert [name for name, _ in changed_parameters(layer("linear", peft.LoHaConfig))] == ["weight", "bias"]


def test_a_merged_layer_and_a_trained_weight_are_refused_with_the_way_out():
    merged, trained = layer("linear"), layer("linear")
    merged.merge()
    with pytest.raises(LataError, match="the adapter on linear is merged into its base weight; call unmerge_adapter"):
        check_layer("linear", merged)
    trained.get_base_layer().weight.requires_grad_(True)
    with pytest.raises(LataError, match="the adapter on linear trains the weight under it as well.*merge_and_unload"):
        check_layer("linear", trained)
    check_layer("linear", layer("linear"))


def test_adapters_that_change_no_weight_or_were_not_compared_with_peft_are_refused():
    with pytest.raises(LataError, match="'soft' is of the type PROMPT_TUNING: it changes no weight of the model"):
        check_kind("soft", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(LataError, match=r"'twice' repeats layers \(layer_replication\)"):
        check_kind("twice", peft.LoraConfig(layer_replication=[(0, 2), (1, 3)]))
    check_kind("plain", peft.LoraConfig())
