import math

import pytest
import torch
from tiny_models import llama
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lata_lightning import LataError
from lata_lightning.errors import LayoutMismatchError
from lata_lightning.evaluation.kernel import linearisation_error

# Torch compiles its own rules for forward-mode differentiation when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


class Quadratic(nn.Module):
    """a² x + b x, with a third parameter that does nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = (nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0, 3.0))

    def forward(self, x):
        return self.a**2 * x + self.b * x


VECTOR = {"a": torch.tensor(1.0), "b": torch.tensor(-0.75), "idle": torch.tensor(1.0)}
SETS = {"a": ["a"], "b": ["b"], "both": ["a", "b"], "idle": ["idle"]}


def test_a_linear_model_has_no_error():
    model = nn.Linear(3, 2)
    vector = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    found = linearisation_error(model, vector, [torch.randn(4, 3) for _ in range(2)])
    assert found == {"all": pytest.approx(0, abs=1e-6), "outside": pytest.approx(0, abs=1e-6)}


def test_the_error_of_a_quadratic_worked_by_hand():
    found = linearisation_error(Quadratic(), VECTOR, [torch.tensor([1.0, -3.0]), torch.tensor([2.0])], scale=0.5, module_sets=SETS)
    # a: (1.5² - 1² - 2 · 0.5) / (1.5² - 1²) = 0.25 / 1.25, whatever x; b is linear; both: 0.25 / (1.25 - 0.375).
    assert found == {"a": pytest.approx(0.2), "b": 0.0, "both": pytest.approx(0.25 / 0.875)}


def test_the_norms_are_taken_over_all_batches():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return (self.a + x) ** 2

    # Change 2 (1 + x) + 1, of which 1 is left over: at x = 0 that is 1 of 3, at x = 1 it is 1 of 5.
    found = linearisation_error(Shifted(), {"a": torch.tensor(1.0)}, [torch.tensor([0.0]), torch.tensor([1.0])])
    assert found["all"] == pytest.approx(math.sqrt(2 / (9 + 25)))


def test_the_parts_of_a_transformer_agree_with_backward_differentiation():
    model = llama().double()
    generator = torch.Generator().manual_seed(1)
    vector = {name: torch.randn(tensor.shape, generator=generator).double() * 0.3 for name, tensor in model.named_parameters()}
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    found = linearisation_error(model, vector, [batch])
    assert list(found) == ["all", "outside", "attention", "mlp", "norm"]

    start = {name: tensor.detach() for name, tensor in model.named_parameters()}
    names = [name for name in start if "self_attn" in name]

    def outputs(*tensors):
        return functional_call(model, {**start, **dict(zip(names, tensors, strict=True))}, kwargs=batch).logits

    here, direction = tuple(start[name] for name in names), tuple(vector[name] for name in names)
    with sdpa_kernel(SDPBackend.MATH):
        _, first_order = torch.autograd.functional.jvp(outputs, here, direction)
    change = outputs(*(one + other for one, other in zip(here, direction, strict=True))) - outputs(*here)
    assert found["attention"] == pytest.approx(((change - first_order).norm() / change.norm()).item(), rel=1e-9)
    assert found["attention"] > 0.01


def test_a_small_step_is_nearly_linear():
    model = llama().double()
    vector = {name: torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    large, small = (linearisation_error(model, vector, [batch], scale=scale)["all"] for scale in (1e-3, 1e-5))
    # What is left over is of second order, the change of first.
    assert small == pytest.approx(large / 100, rel=0.1)


def test_the_model_is_left_as_it_was_and_the_start_may_be_given():
    model = Quadratic().train()
    found = linearisation_error(model, VECTOR, [torch.ones(1)], start={"a": torch.tensor(0.0)}, module_sets={"a": ["a"]})
    # From 0 a square has no first order at all.
    assert found == {"a": 1.0}
    assert model.training
    assert [parameter.item() for parameter in model.parameters()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("vector", "data", "options", "error", "message"),
    [
        (VECTOR, [], {}, LataError, "at least one batch"),
        (VECTOR, [torch.ones(1)], {"scale": math.inf}, LataError, r"finite numbers, at least one, got \[inf\]"),
        (VECTOR, [torch.ones(1)], {"module_sets": {"c": ["c"]}}, LataError, r"it has none named 1: \['c'\]"),
        ({"c": torch.ones(1)}, [torch.ones(1)], {}, LayoutMismatchError, "the task vector must hold parameters of the model"),
    ],
)
def test_invalid_arguments_are_refused(vector, data, options, error, message):
    with pytest.raises(error, match=message):
        linearisation_error(Quadratic(), vector, data, **options)
