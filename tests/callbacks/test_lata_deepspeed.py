"""DeepSpeed on two CPU processes: the float32 masters are measured, not the parameters that are rounded from them.

Runs where DeepSpeed is installed: ``make deepspeed``.
"""

import importlib.util

import pytest
import torch
from lightning_models import make_models
from safetensors.torch import load_file
from tiny_models import same_bits
from two_processes import history, start

from lata_lightning import TaskVector, align

# Not imported here: it would start a process group of its own.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
WHOLE = ["1", "2", "3", "2-coarse", "3-coarse", "2-fp32", "3-fp32", "2-fp16", "3-fp16", "2-frozen", "3-frozen", "2-offload", "3-offload"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), vocab_size=33, intermediate_size=25)


@pytest.fixture(scope="module")
def output(models, tmp_path_factory):
    """A directory with the results of each case of the script."""
    output = tmp_path_factory.mktemp("deepspeed")
    start(output, "deepspeed_run.py", models, output, DS_ACCELERATOR="cpu")
    return output


def sides(output):
    return load_file(output / "start.safetensors"), load_file(output / "tuned.safetensors")


@pytest.mark.parametrize("case", WHOLE)
def test_the_vector_is_the_difference_of_the_float32_masters(models, output, case):
    before, after = sides(output / case)
    expected = {name: after[name] - before[name] for name in before}
    exported = TaskVector.open(output / case / "lata/task_vector")
    assert same_bits({name: exported[name] for name in exported}, expected)
    rows = history(output / case)
    assert [row["step"] for row in rows] == [3, 4, 6, 8]
    norm = sum(delta.double().square().sum().item() for delta in expected.values()) ** 0.5
    assert rows[-1]["task_norm"] == pytest.approx(norm, rel=1e-9)
    # The start is rounded to the precision of the forward pass, so it is not quite the instruct model any more.
    alignment = align(exported.unweighted(), TaskVector.open(models / "instruction"), check_base=False)
    assert exported.manifest.alignment.values == pytest.approx(alignment.values, rel=1e-9)


@pytest.mark.parametrize("case", ["2-coarse", "3-coarse"])
def test_steps_that_do_not_show_in_half_precision_are_measured(output, case):
    before, after = sides(output / case)
    moved = [(after[name] != before[name]).double().mean().item() for name in before]
    rounded = [(after[name].bfloat16() != before[name].bfloat16()).double().mean().item() for name in before]
    assert sum(rounded) < 0.5 * sum(moved)


@pytest.mark.parametrize("case", ["2-frozen", "3-frozen"])
def test_frozen_layers_are_recorded_as_unchanged(output, case):
    unchanged = TaskVector.open(output / case / "lata/task_vector").unchanged
    assert unchanged == {name for name in sides(output / case)[0] if "mlp" in name}


@pytest.mark.parametrize("case", ["2-lora", "3-lora"])
def test_adapters_are_measured_in_the_masters_of_their_factors(output, case):
    _, after = sides(output / case)
    exported = TaskVector.open(output / case / "lata/task_vector")
    square = 0.0
    for name, second in after.items():
        if name.endswith("lora_B.default.weight"):
            first = after[name.replace("lora_B", "lora_A")]
            product = 2 * second.double() @ first.double()
            stored = exported[name.removeprefix("base_model.model.").replace(".lora_B.default", "")]
            torch.testing.assert_close(stored.double(), product, rtol=1e-6, atol=1e-9)
            square += product.square().sum().item()
    assert square > 0
    assert history(output / case)[-1]["task_norm"] == pytest.approx(square**0.5, rel=1e-9)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_training_is_bit_identical_with_and_without_the_callback(output, stage):
    assert same_bits(sides(output / stage)[1], sides(output / f"{stage}-without")[1])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(output, stage):
    assert history(output / f"{stage}-resumed") == history(output / stage)
    vectors = [TaskVector.open(output / case / "lata/task_vector") for case in (f"{stage}-resumed", stage)]
    assert same_bits(*({name: vector[name] for name in vector} for vector in vectors))


def test_masters_that_are_not_shown_are_refused_before_the_first_step(output):
    first, second = ((output / f"hidden/refused-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "only rounded values could be measured" in first
    assert "Use ZeRO stage 1, 2 or 3" in first
