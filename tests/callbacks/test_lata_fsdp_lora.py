"""LoRA under FSDP2 on two CPU processes: what is measured in sharded factors is what merged weights would give."""

import json

import peft
import pytest
import torch
from lightning_models import make_models
from safetensors.torch import load_file
from tiny_models import same_bits
from transformers import LlamaForCausalLM
from two_processes import history, start

from lata_lightning import TaskVector
from lata_lightning.quickstart.experts import INSTRUCT

CASES = ["plain", "resumed", "peft", "saved", "pissa", "several"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), vocab_size=33, intermediate_size=25)


@pytest.fixture(scope="module")
def output(models, tmp_path_factory):
    """A directory with the results of each case of the script."""
    output = tmp_path_factory.mktemp("adapted")
    start(output, "fsdp_lora_run.py", models, output)
    return output


def flat(tensors, prefix=""):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith(prefix)])


@pytest.mark.parametrize("case", CASES)
def test_sharded_factors_give_the_figures_of_the_merged_weights(models, output, case):
    before, after = (load_file(output / ("plain" if case == "resumed" else case) / f"{side}.safetensors") for side in ("start", "tuned"))
    base, instruct = (LlamaForCausalLM.from_pretrained(models / kind).state_dict() for kind in ("base", "instruct"))
    task = {name: after[name] - before[name] for name in before}
    direction = {name: (instruct[name] - base[name]).double() for name in before}
    row = history(output / case)[-1]
    assert row["step"] == 8
    assert row["task_norm"] == pytest.approx(flat(task).norm().item(), rel=1e-7)
    for layer, figures in row["layers"].items():
        one, other = flat(task, f"{layer}."), flat(direction, f"{layer}.")
        alignment = torch.nn.functional.cosine_similarity(one + other, other, dim=0).item()
        assert figures["alignment"] == pytest.approx(alignment, rel=1e-7)
    exported = TaskVector.open(output / case / "lata/task_vector")
    for name, delta in task.items():
        stored = exported[name].double() if name in exported else torch.zeros_like(delta)
        torch.testing.assert_close(stored, delta, rtol=1e-5, atol=1e-8)


def test_training_is_bit_identical_with_and_without_the_callback(output):
    assert same_bits(*(load_file(output / case / "tuned.safetensors") for case in ("plain", "without")))


def test_a_resumed_run_ends_like_the_uninterrupted_one(output):
    assert history(output / "resumed") == history(output / "plain")
    assert same_bits(*(load_file(output / case / "lata/task_vector/delta.safetensors") for case in ("resumed", "plain")))


# peft asks a model of transformers for an attribute by its older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_exported_adapter_makes_the_tuned_model_in_peft(models, output):
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "instruct"), output / "peft/lata/peft")
    adapted, tuned = model.merge_and_unload().state_dict(), load_file(output / "peft/tuned.safetensors")
    for name, expected in tuned.items():
        torch.testing.assert_close(adapted[name].double(), expected, rtol=0, atol=1e-6)


def test_the_recipe_for_lora_runs_sharded(tmp_path):
    """``lata fit --config track_lora`` with the strategy of the recipe for FSDP2."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number} + 1 =", "completion": str(number + 1)}) + "\n" for number in range(32)))
    strategy = json.dumps(
        {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
        }
    )
    options = {"data.data": rows, "output": tmp_path / "run", "trainer.devices": 2, "trainer.accelerator": "cpu", "trainer.max_epochs": 1}
    flags = [part for name, value in {**options, "trainer.strategy": strategy}.items() for part in (f"--{name}", str(value))]
    start(tmp_path, None, "fit", "--config", "track_lora", *flags, module="lata_lightning")
    vector = TaskVector.open(tmp_path / "run/lata/task_vector")
    assert vector.manifest.start_identity.location == str(INSTRUCT)
    assert any(vector[name].any() for name in vector)
