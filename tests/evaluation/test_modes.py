import pytest
import torch
from torch import nn

from lata_lightning.evaluation.modes import evaluating


def partly_training():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[2].eval()
    return model


@pytest.mark.parametrize("inference", [True, False])
def test_every_module_has_its_own_mode_again_after_the_block_even_after_an_error(inference):
    model = partly_training()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model, inference=inference):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_no_gradients_are_recorded_and_inference_tensors_are_made_only_where_they_may_be():
    model = partly_training()
    with evaluating(model):
        assert model(torch.ones(1, 2)).is_inference()
    with evaluating(model, inference=False):
        output = model(torch.ones(1, 2))
    assert not output.requires_grad
    assert not output.is_inference()
