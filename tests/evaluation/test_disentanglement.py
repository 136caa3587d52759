import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from lata_lightning import LataError, TaskVector
from lata_lightning.errors import LayoutMismatchError
from lata_lightning.evaluation.disentanglement import GRID, DisentanglementError, disentanglement_error, heat_map
from lata_lightning.evaluation.weight_functions import WeightFunction


class Slope(nn.Module):
    """Logits (w x + 1, 0): class 0 where w x > -1."""

    def __init__(self, slope=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(slope))

    def forward(self, x):
        return torch.stack([self.w * x + 1, torch.zeros_like(x)], -1)


STEPS = [{"w": torch.tensor(1.0)}, {"w": torch.tensor(-2.0)}]
SAMPLES = [[torch.tensor([1.0, -1.0]), torch.tensor([4.0])], [torch.tensor([1.0, 4.0])]]


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def random_vector(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(parameter.shape, generator=generator) for name, parameter in model.named_parameters()}


def random_data():
    return [list(torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)).split(5)) for seed in (1, 2)]


def test_the_error_of_two_classes_worked_by_hand():
    found = disentanglement_error(Slope(), STEPS, SAMPLES, scales_1=[0, 1], scales_2=[0, 1])
    # Slopes: 0.5 at (0, 0), 1.5 at (1, 0), -1.5 at (0, 1), -0.5 at (1, 1). Classes of x = 1, -1, 4 there: 000, 010, 101, 001.
    first = torch.tensor([[0, 2 / 3], [0, 2 / 3]], dtype=torch.float64)
    # Of x = 1, 4: 00, 00, 11, 01.
    second = torch.tensor([[0, 0], [0, 1 / 2]], dtype=torch.float64)
    assert torch.equal(found.by_task, torch.stack([first, second]))
    assert torch.equal(found.error, first + second)
    assert (found.scales_1, found.scales_2, found.samples) == ((0.0, 1.0), (0.0, 1.0), (3, 2))


def test_the_distance_of_representations_worked_by_hand():
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    vectors = [{"weight": torch.zeros(2, 1)}, {"weight": torch.tensor([[math.log(3)], [0.0]])}]
    found = disentanglement_error(model, vectors, [[torch.ones(2, 1)]] * 2, scales_1=[1], scales_2=[1], distance="representation")
    # Task 1: from (1/2, 1/2) to (3/4, 1/4): half of (1/4) log(3/2) + (1/4) log 2. Task 2 has the same alone and together.
    assert found.by_task.flatten().tolist() == pytest.approx([math.log(3) / 8, 0], rel=1e-6)


@pytest.mark.parametrize("distance", ["prediction", "representation"])
def test_the_error_is_zero_at_the_origin_and_along_each_axis_for_its_own_task(distance):
    model = two_layers()
    vectors = [random_vector(model, 3), random_vector(model, 4)]
    scales = (-1.0, 0.0, 0.5, 1.0)
    found = disentanglement_error(model, vectors, random_data(), scales_1=scales, scales_2=scales, distance=distance)
    assert found.error[1, 1] == 0
    assert not found.by_task[0, :, 1].any()
    assert not found.by_task[1, 1, :].any()
    # But the other task feels it, and both do off the axes.
    assert found.by_task[1, :, 1].any()
    assert (found.error[0] > 0).all()


def test_a_linear_model_whose_tasks_have_disjoint_supports_is_disentangled_everywhere():
    model = nn.Linear(4, 3, bias=False)
    own = [torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])]
    vectors = [{"weight": torch.randn(3, 4) * 5 * support} for support in own]
    data = [[torch.randn(20, 4) * support] for support in own]
    for distance in ("prediction", "representation"):
        found = disentanglement_error(model, vectors, data, scales_1=GRID[::5], scales_2=GRID[::4], distance=distance)
        assert not found.error.any()
    # On data that both act on they are entangled.
    mixed = disentanglement_error(model, vectors, [[torch.randn(20, 4)]] * 2, scales_1=[1], scales_2=[1])
    assert mixed.error.all()


def test_the_default_grid_has_21_points_a_side_with_the_start_and_both_whole_vectors():
    found = disentanglement_error(Slope(), STEPS, SAMPLES)
    assert found.error.shape == (21, 21)
    assert (GRID[0], GRID[10], GRID[15], GRID[-1]) == (-2, 0, 1, 2)
    assert found.error[15, 15] == pytest.approx(7 / 6)


@pytest.mark.parametrize("distance", ["prediction", "representation"])
def test_the_metric_agrees_with_the_function_over_several_updates_and_merged_states(distance):
    model = two_layers().eval()
    vectors, data, scales = [random_vector(model, 3), random_vector(model, 4)], random_data(), (0.0, 0.7)
    expected = disentanglement_error(model, vectors, data, scales_1=scales, scales_2=scales, distance=distance).error

    def logits(batch, factors):
        moved = {
            name: parameter.detach() + sum(factor * vector[name] for factor, vector in zip(factors, vectors, strict=True))
            for name, parameter in model.named_parameters()
        }
        return torch.func.functional_call(model, moved, (batch,))

    metrics = [DisentanglementError(scales, scales, distance) for _ in range(2)]
    for task, batches in enumerate(data):
        for number, batch in enumerate(batches):
            for row, first in enumerate(scales):
                for column, second in enumerate(scales):
                    alone = logits(batch, (first, 0) if task == 0 else (0, second))
                    metrics[number % 2].update(task, row, column, alone, logits(batch, (first, second)))
    metrics[0].merge_state(metrics[1])
    torch.testing.assert_close(metrics[0].compute(), expected, rtol=1e-5, atol=1e-12)
    assert metrics[0].samples.unique().tolist() == [12]
    metrics[0].reset()
    assert not metrics[0].sums.any()


def test_a_point_without_samples_of_both_tasks_is_undefined():
    metric = DisentanglementError([0.0], [0.0, 1.0])
    metric.update(0, 0, 0, torch.eye(2), torch.eye(2))
    metric.update(1, 0, 0, torch.eye(2), 1 - torch.eye(2))
    metric.update(0, 0, 1, torch.eye(2), torch.eye(2))
    assert metric.compute()[0, 0] == 1
    assert metric.compute()[0, 1].isnan()


def test_representations_that_are_zero_on_both_sides_add_nothing():
    metric = DisentanglementError([0.0], [0.0], "representation")
    features = torch.tensor([[0.0, 0.0, -math.inf]])
    for task in range(2):
        metric.update(task, 0, 0, features, features)
    assert metric.compute().item() == 0


def test_only_the_samples_that_outputs_gives_are_counted():
    padded = [[{"x": torch.tensor([1.0, -1.0, 0.0]), "real": torch.tensor([True, True, False])}] for _ in range(2)]
    found = disentanglement_error(
        Slope(), STEPS, padded, scales_1=[0], scales_2=[1], outputs=lambda model, batch: model(batch["x"])[batch["real"]]
    )
    assert found.samples == (2, 2)
    assert found.error.item() == 1 / 2


def test_the_model_is_left_as_it_was_and_the_start_may_be_given():
    model = two_layers().train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = [random_vector(model, 3), random_vector(model, 4)]
    scales = {"scales_1": [0.5], "scales_2": [0.5], "distance": "representation"}
    start = random_vector(model, 5)
    found = disentanglement_error(model, vectors, random_data(), start=start, **scales)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True]
    model.load_state_dict(start)
    assert torch.equal(disentanglement_error(model, vectors, random_data(), **scales).error, found.error)


def test_vectors_are_added_to_half_precision_weights_with_one_rounding():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    delta = torch.randn(64, 64) * 1e-2
    function = WeightFunction(model, outputs=lambda model, batch: model(batch))
    vectors = [function.load({"weight": vector}, "a vector") for vector in (delta, delta)]
    found = function.at(vectors, [1.0, -0.5])["weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (model.weight.detach().float() + delta - delta / 2).bfloat16())
    assert torch.equal(function.at(vectors, [0.0, 0.0])["weight"], model.weight)


def test_data_may_come_from_loaders_and_generators():
    data = [DataLoader(torch.cat(SAMPLES[0]), batch_size=2), (batch for batch in SAMPLES[1])]
    found = disentanglement_error(Slope(), STEPS, data, scales_1=[0, 1], scales_2=[0, 1])
    assert found.error[1, 1] == pytest.approx(7 / 6)


def test_a_stored_vector_acts_on_a_model_that_is_saved_under_other_names(tmp_path):
    def vision(seed):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
            hidden_dropout_prob=0.0,
        )  # fmt: skip
        return ViTForImageClassification(config)

    models = [vision(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    start, *tuned = models
    stored = [TaskVector.between(tmp_path / "0", tmp_path / str(number)).save(tmp_path / f"vector{number}") for number in (1, 2)]
    plain = [{name: other - dict(start.named_parameters())[name] for name, other in model.named_parameters()} for model in tuned]
    assert set(stored[0]) != set(plain[0])
    data = [[{"pixel_values": torch.randn(3, 3, 8, 8)}] for _ in range(2)]
    found = [
        disentanglement_error(start, vectors, data, scales_1=[1], scales_2=[1], distance="representation").error
        for vectors in (stored, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    assert found[0].item() > 0


def test_a_vector_may_lack_what_does_not_move():
    model = two_layers()
    whole = [random_vector(model, 3), random_vector(model, 4)]
    part = [{name: vector[name] for name in ("0.weight", "0.bias")} for vector in whole]
    padded = [{name: tensor if name in part[0] else torch.zeros_like(tensor) for name, tensor in vector.items()} for vector in whole]
    scales = {"scales_1": [1.0], "scales_2": [0.5], "distance": "representation"}
    one, other = (disentanglement_error(model, vectors, random_data(), **scales).error for vectors in (part, padded))
    assert torch.equal(one, other)


def test_the_heat_map_shows_scale_1_to_the_right(tmp_path):
    pytest.importorskip("matplotlib")
    found = disentanglement_error(Slope(), STEPS, SAMPLES, scales_1=[0, 1, 2], scales_2=[0, 1])
    figure = heat_map(found, tmp_path / "map.png")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("scale_1", "scale_2")
    assert axes.collections[0].get_array().tolist() == found.error.T.tolist()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LataError, match="at least two scales on each axis, got 1 and 2"):
        heat_map(disentanglement_error(Slope(), STEPS, SAMPLES, scales_1=[0], scales_2=[0, 1]))


def test_without_matplotlib_the_heat_map_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LataError, match=r"install lata_lightning\[report\]"):
        heat_map(disentanglement_error(Slope(), STEPS, SAMPLES, scales_1=[0, 1], scales_2=[0, 1]))


@pytest.mark.parametrize(
    ("vectors", "data", "options", "error", "message"),
    [
        (STEPS[:1], SAMPLES, {}, LataError, "two task vectors and two data sets, got 1 and 2"),
        (STEPS, SAMPLES[:1], {}, LataError, "two task vectors and two data sets, got 2 and 1"),
        (STEPS, [SAMPLES[0], []], {"scales_1": [0], "scales_2": [0]}, LataError, "at least one sample, got 3 and 0"),
        (STEPS, SAMPLES, {"scales_1": []}, LataError, r"finite numbers, at least one, got \[\]"),
        (STEPS, SAMPLES, {"scales_2": [0, math.nan]}, LataError, r"finite numbers, at least one, got \[0, nan\]"),
        (STEPS, SAMPLES, {"distance": "cosine"}, LataError, "unknown distance 'cosine'; choose one of prediction, representation"),
        ([STEPS[0], {"v": torch.ones(())}], SAMPLES, {}, LayoutMismatchError, r"task vector 2 must hold parameters.* 1: \['v'\]"),
        (
            [STEPS[0], {"w": torch.ones(2)}],
            SAMPLES,
            {},
            LayoutMismatchError,
            r"task vector 2 must have the shapes.*1 of 1 tensors differs: \['w'\]",
        ),
        (STEPS, SAMPLES, {"start": {"v": torch.ones(())}}, LayoutMismatchError, "the start weights must hold parameters"),
    ],
)
def test_invalid_arguments_are_refused(vectors, data, options, error, message):
    with pytest.raises(error, match=message):
        disentanglement_error(Slope(), vectors, data, **options)


def test_a_model_whose_output_is_no_tensor_needs_a_function():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Pair(2, 2)
    with pytest.raises(LataError, match="a tensor or have logits, got tuple; give outputs="):
        disentanglement_error(model, [{}, {}], [[torch.ones(1, 2)]] * 2, scales_1=[0], scales_2=[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, 0, 0, torch.eye(2), torch.eye(2)), LataError, "grid of 1 × 2 points, got 2, 0 and 0"),
        ((0, 0, 2, torch.eye(2), torch.eye(2)), LataError, "grid of 1 × 2 points, got 0, 0 and 2"),
        ((0, 0, 0, torch.eye(2), torch.eye(3)), LayoutMismatchError, r"one shape, got \(2, 2\) and \(3, 3\)"),
    ],
)
def test_an_update_outside_the_grid_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DisentanglementError([0.0], [0.0, 1.0]).update(*arguments)
