import json
from dataclasses import replace

import pytest
import torch
import yaml
from architectures import save_family
from safetensors.torch import load_file
from tiny_models import leftovers, llama, read_back, same_bits, weights, write_checkpoint, write_model

from lata_lightning.errors import BaseMismatchError, LataError, OutputError
from lata_lightning.exports.mergekit import export_mergekit
from lata_lightning.merging.merge import Term
from lata_lightning.vectors.task_vector import TaskVector


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A start and two tuned models with sixteen blocks in a stack that has the numbers 1 and 10 to 15 in its names."""
    directory = tmp_path_factory.mktemp("models")
    found = {}
    for label, seed in (("start", 0), ("one", 1), ("other", 2)):
        generator = torch.Generator().manual_seed(seed)
        names = [f"model.layers.{block}.self_attn.{part}.weight" for block in range(16) for part in ("q_proj", "k_proj")]
        tensors = {name: torch.randn(4, 4, generator=generator) for name in ("model.embed_tokens.weight", *names, "lm_head.weight")}
        found[label] = write_model(directory / label, tensors, config={"architectures": ["LlamaForCausalLM"]})
    return found


def weighted(models, tuned="one", *, level="tensor", outside=0.25):
    vector = TaskVector.between(str(models["start"]), str(models[tuned]))
    found = {layer: 0.01 + 1e-6 * index for index, layer in enumerate(vector.layers.layers(level))}
    return TaskVector(vector.tensors, replace(vector.manifest, level=level, outside=outside, coefficients=found, weighting="linear"))


def first_match(settings, name):
    """What mergekit takes: the first setting without a filter, or with one that is part of the name."""
    return next(setting["value"] for setting in settings if setting.get("filter", "") in name)


def configuration(directory):
    return yaml.safe_load((directory / "merge.yaml").read_text())


def test_every_tensor_has_the_factor_of_a_merge(tmp_path, models):
    term = Term(weighted(models), 1e-4)
    export_mergekit([term], tmp_path / "out")
    settings = configuration(tmp_path / "out")["models"][0]["parameters"]["weight"]
    for name in term.vector:
        value = first_match(settings, name)
        assert isinstance(value, float)
        assert value == 1e-4 * term.vector.coefficient_of(name)


def test_names_within_names_do_not_take_each_others_weights(tmp_path):
    # The shorter name is a part of the longer one.
    names = ("head.weight", "lm_head.weight", "model.layers.0.self_attn.q.weight")
    start = write_model(tmp_path / "start", {name: torch.zeros(2, 2) for name in names})
    tuned = write_model(tmp_path / "tuned", {name: torch.ones(2, 2) for name in names})
    vector = TaskVector.between(str(start), str(tuned), layers=r"^(lm_head|head|model)")
    coefficients = {"head": 0.1, "lm_head": 0.2, "model": 0.3}
    vector = TaskVector(vector.tensors, replace(vector.manifest, coefficients=coefficients, weighting="linear"))
    export_mergekit([Term(vector)], tmp_path / "out")
    settings = configuration(tmp_path / "out")["models"][0]["parameters"]["weight"]
    assert [first_match(settings, name) for name in names] == [0.1, 0.2, 0.3]


def test_the_configuration_asks_for_sums_in_float32_and_the_dtype_of_the_start(tmp_path):
    start = write_model(tmp_path / "start", weights(0, dtype=torch.bfloat16))
    tuned = write_model(tmp_path / "tuned", weights(1, dtype=torch.bfloat16))
    export_mergekit([Term(TaskVector.between(str(start), str(tuned)), -0.5)], tmp_path / "out")
    found = configuration(tmp_path / "out")
    assert {key: found[key] for key in ("merge_method", "base_model", "dtype", "out_dtype", "parameters")} == {
        "merge_method": "task_arithmetic",
        "base_model": str(start),
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "parameters": {"normalize": False, "lambda": 1.0},
    }


def test_a_tuned_model_that_is_still_there_is_named_and_nothing_is_written(tmp_path, models):
    export_mergekit([Term(weighted(models)), Term(weighted(models, "other"))], tmp_path / "out")
    assert [entry["model"] for entry in configuration(tmp_path / "out")["models"]] == [str(models["one"]), str(models["other"])]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"merge.yaml", "README.md"}


@pytest.mark.parametrize("change", ["gone", "other weights", "other tensors", "pure", "low precision", "plus"])
def test_a_vector_whose_tuned_model_is_not_to_be_had_brings_start_plus_vector(tmp_path, models, change):
    label = "a+b" if change == "plus" else "tuned"
    tuned = write_model(tmp_path / label, read_back(models["one"]))
    vector = weighted({**models, label: tuned}, label)
    vector = vector.pure() if change == "pure" else vector
    vector.save(tmp_path / "vector", dtype="bfloat16" if change == "low precision" else "float32")
    vector = TaskVector.open(tmp_path / "vector")
    if change == "gone":
        tuned.rename(tmp_path / "elsewhere")
    elif change == "other weights":
        (tuned / "model.safetensors").write_bytes((models["other"] / "model.safetensors").read_bytes())
    elif change == "other tensors":
        tuned.rename(tmp_path / "elsewhere")
        write_model(tuned, weights(0))
    export_mergekit([Term(vector, 0.5)], tmp_path / "out")
    assert configuration(tmp_path / "out")["models"][0]["model"] == "./vector-1"
    start, whole = read_back(models["start"]), read_back(tmp_path / "out" / "vector-1")
    # Coefficients and scale are in the weights, and not in the model.
    assert same_bits(whole, {name: (tensor.double() + vector[name].double()).float() for name, tensor in start.items()})
    assert json.loads((tmp_path / "out" / "vector-1" / "config.json").read_text())["dtype"] == "float32"


def test_the_card_names_the_command_and_what_it_runs_on(tmp_path, models):
    export_mergekit([Term(weighted(models), 0.5)], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nmergekit-yaml merge.yaml OUTPUT\n" in card
    assert f"| 0.5 | linear | `{models['one']}`, the tuned model itself |" in card
    assert "some units in the last place" in card


def test_the_weights_of_experts_go_by_the_names_of_their_module_as_well(tmp_path):
    family = save_family(tmp_path, "mixtral")
    vector = weighted({"start": family["start"], "one": family["tuned-1"]}, level="block")
    export_mergekit([Term(vector, 2.0)], tmp_path / "out")
    settings = configuration(tmp_path / "out")["models"][0]["parameters"]["weight"]
    for block, value in vector.manifest.coefficients.items():
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight", "block_sparse_moe.experts.0.w1.weight"):
            assert first_match(settings, f"{block}.{name}") == 2.0 * value


def refused(tmp_path, kind, message, terms, **options):
    with pytest.raises(kind, match=message):
        export_mergekit(terms, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    assert not leftovers(tmp_path)


def test_experts_of_different_weights_are_refused(tmp_path):
    family = save_family(tmp_path, "mixtral")
    vector = weighted({"start": family["start"], "one": family["tuned-1"]})
    refused(tmp_path, LataError, "merges model.layers.0.mlp.experts.gate_up_proj as one tensor, .* has 8 weights", [Term(vector)])


@pytest.mark.parametrize("mark", ["+", "@"])
def test_a_start_whose_path_means_something_else_to_mergekit_is_refused(tmp_path, mark):
    start = write_model(tmp_path / f"start{mark}1", weights(0))
    vector = TaskVector.between(str(start), weights(1))
    refused(tmp_path, LataError, r"mergekit takes \+ and @ in a path", [Term(vector)])


def test_a_start_that_is_no_model_directory_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "start.ckpt", weights(0), prefix="")
    vector = TaskVector.between(str(checkpoint), weights(1))
    refused(tmp_path, LataError, "start.ckpt is none: name one", [Term(vector)])
    refused(tmp_path, LataError, "weights in memory is none", [Term(vector)], onto=weights(0))


def test_another_start_than_that_of_the_vector_is_refused(tmp_path, models):
    weighted(models).save(tmp_path / "vector")
    refused(tmp_path, BaseMismatchError, "these are different weights", [Term(TaskVector.open(tmp_path / "vector"))], onto=models["other"])


def test_an_output_that_exists_is_refused(tmp_path):
    (tmp_path / "theirs").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        export_mergekit([], tmp_path)


def test_a_tied_model_has_one_embedding(tmp_path):
    llama(0, tied=True).save_pretrained(tmp_path / "start")
    vector = TaskVector.between(str(tmp_path / "start"), llama(1, tied=True))
    export_mergekit([Term(vector, 0.5)], tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "vector-1" / "model.safetensors")
