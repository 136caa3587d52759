import csv
import json
from dataclasses import replace

import pytest
import torch
from adapting import reference
from safetensors.torch import load_file
from tiny_models import BLOCKS, leftovers, llama, read_back, same_bits, weights, write_model
from transformers import AutoModelForCausalLM

from lata_lightning.errors import BaseMismatchError, LataError, OutputError, SourceError
from lata_lightning.exports import EXPORTS, export_to
from lata_lightning.merging.merge import Term, merge
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector


@pytest.fixture
def models(tmp_path):
    return {label: write_model(tmp_path / label, weights(seed)) for seed, label in enumerate(("start", "one", "other"))}


def vector_of(models, tuned="one", rule="linear", **settings):
    vector = TaskVector.between(str(models["start"]), str(models[tuned]))
    if rule is None:
        return vector
    instruction = TaskVector.between(weights(8), weights(9), kind="instruction")
    return vector.weighted(align(vector, instruction), rule, **settings)


def refused(tmp_path, kind, message, export, terms, **options):
    before = set(tmp_path.iterdir())
    with pytest.raises(kind, match=message):
        export_to(export, terms, tmp_path / "refused", **options)
    assert set(tmp_path.iterdir()) == before
    assert not leftovers(tmp_path)


def test_a_pure_vector_is_the_vector_times_its_coefficients(tmp_path, models):
    vector = vector_of(models, outside=0.5)
    export_to("pure", [Term(vector)], tmp_path / "pure")
    pure = TaskVector.open(tmp_path / "pure")
    assert pure.manifest.coefficients is None
    factors = {
        "model.layers.0": vector.manifest.coefficients["model.layers.0"],
        "model.layers.1": vector.manifest.coefficients["model.layers.1"],
    }
    for name in vector:
        factor = next((factors[block] for block in BLOCKS if name.startswith(block)), 0.5)
        assert torch.equal(pure[name], vector[name] * factor)


def test_a_pure_vector_of_low_precision_tells_what_that_cost(tmp_path, models):
    export_to("pure", [Term(vector_of(models))], tmp_path / "pure", dtype="bfloat16")
    loss = TaskVector.open(tmp_path / "pure").manifest.precision_loss
    assert 0.999 < loss.cosine < 1


def test_no_pure_vector_is_made_of_two_or_of_one_without_coefficients(tmp_path, models):
    refused(tmp_path, LataError, "made of one vector, got 2", "pure", [Term(vector_of(models)), Term(vector_of(models, "other"))])
    refused(tmp_path, LataError, "has no coefficients", "pure", [Term(vector_of(models, rule=None))])


def test_a_model_directory_is_the_merge_onto_the_recorded_start(tmp_path, models):
    terms = [Term(vector_of(models), 0.5), Term(vector_of(models, "other"), -0.25)]
    export_to("hf", terms, tmp_path / "out", command="lata export")
    merge(models["start"], terms, tmp_path / "merged")
    assert same_bits(read_back(tmp_path / "out"), read_back(tmp_path / "merged"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card
    assert "lata export" in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_an_exported_model_directory(tmp_path, dtype):
    for seed, label in enumerate(("start", "tuned")):
        llama(seed, dtype=dtype).save_pretrained(tmp_path / label)
    vector = TaskVector.between(str(tmp_path / "start"), str(tmp_path / "tuned"))
    export_to("hf", [Term(vector, -0.5)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    wanted = load_file(reference(tmp_path / "wanted", tmp_path / "start", [(tmp_path / "tuned", -0.5)]) / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])


def test_a_model_directory_of_another_dtype_has_it_in_weights_and_config(tmp_path, models):
    export_to("hf", [Term(vector_of(models))], tmp_path / "out", dtype="float16")
    assert {tensor.dtype for tensor in read_back(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_start_elsewhere_can_be_named(tmp_path, models):
    vector_of(models).save(tmp_path / "vector")
    vector = TaskVector.open(tmp_path / "vector")
    moved = models["start"].rename(tmp_path / "elsewhere")
    export_to("hf", [Term(vector)], tmp_path / "out", onto=moved)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["onto"]["location"] == str(moved)


def test_a_start_that_has_changed_is_refused_unless_the_check_is_off(tmp_path, models):
    vector_of(models).save(tmp_path / "vector")
    term = Term(TaskVector.open(tmp_path / "vector"))
    (models["start"] / "model.safetensors").write_bytes((models["other"] / "model.safetensors").read_bytes())
    refused(tmp_path, BaseMismatchError, f"{models['start']} has blake3:.*: these are different weights", "hf", [term])
    export_to("hf", [term], tmp_path / "out", check_base=False)


def test_a_start_of_unknown_location_must_be_named(tmp_path):
    vector = TaskVector.between(weights(0), weights(1))
    refused(tmp_path, LataError, "does not record where its start model lies: name it", "hf", [Term(vector)])
    export_to("hf", [Term(vector)], tmp_path / "out", onto=weights(0))


def test_coefficients_come_with_the_alignment_behind_them(tmp_path, models):
    vectors = [vector_of(models, outside=0.5), vector_of(models, "other", outside=0.5)]
    export_to("coefficients", [Term(vector) for vector in vectors], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert {key: found[key] for key in found if key != "vectors"} == {
        "level": "block",
        "outside": 0.5,
        "weighting": "linear",
        "threshold": None,
    }
    for entry, vector in zip(found["vectors"], vectors, strict=True):
        assert entry == {
            "vector": vector.label,
            "coefficients": vector.manifest.coefficients,
            "alignment": vector.manifest.alignment.to_json(),
        }


def test_the_table_of_coefficients_has_a_row_for_each_layer_and_each_tensor_outside(tmp_path, models):
    vector = vector_of(models, outside=0.5)
    export_to("coefficients", [Term(vector)], tmp_path / "out")
    with (tmp_path / "out" / "coefficients.csv").open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == list(BLOCKS)
    assert set(rows) == {*BLOCKS, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, stats in vector.manifest.alignment.layers.items():
        assert float(rows[layer]["alignment"]) == stats.alignment
        assert float(rows[layer]["relative_norm"]) == stats.relative_norm
        assert float(rows[layer]["task_norm"]) == stats.task_norm
        assert float(rows[layer]["instruction_norm"]) == stats.instruction_norm
        assert float(rows[layer]["coefficient"]) == vector.manifest.coefficients[layer]
        assert rows[layer]["ranked"] == "true"
    assert rows["lm_head.weight"]["ranked"] == "false"
    assert float(rows["lm_head.weight"]["coefficient"]) == 0.5


def test_a_vector_without_a_rule_has_coefficients_of_one_and_no_alignment(tmp_path, models):
    export_to("coefficients", [Term(vector_of(models, rule=None))], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert (found["weighting"], found["outside"]) == ("none", 1.0)
    assert found["vectors"][0]["coefficients"] == dict.fromkeys(BLOCKS, 1.0)
    assert found["vectors"][0]["alignment"] is None
    lines = (tmp_path / "out" / "coefficients.csv").read_text().splitlines()
    assert lines[1].endswith(",true,,,,,1.0")


def test_a_threshold_is_told_with_the_rule_that_has_one(tmp_path, models):
    export_to("coefficients", [Term(vector_of(models, rule="threshold", threshold=0.8))], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert (found["weighting"], found["threshold"]) == ("threshold", 0.8)


def test_coefficients_of_two_rules_do_not_share_a_file(tmp_path, models):
    terms = [Term(vector_of(models)), Term(vector_of(models, "other", "log"))]
    refused(tmp_path, LataError, "one file holds vectors of one rule; .*'linear'.*'log'", "coefficients", terms)


@pytest.mark.parametrize("kind", EXPORTS)
def test_no_export_writes_over_what_is_there(tmp_path, models, kind):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/theirs").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        export_to(kind, [Term(vector_of(models))], tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["theirs"]


@pytest.mark.parametrize("kind", ["pure", "hf", "mergekit", "coefficients"])
def test_an_empty_directory_may_be_written_to(tmp_path, models, kind):
    (tmp_path / "out").mkdir()
    export_to(kind, [Term(vector_of(models))], tmp_path / "out")
    assert any((tmp_path / "out").iterdir())


def test_a_vector_from_base_with_coefficients_is_refused(models):
    vector = vector_of(models)
    with pytest.raises(LataError, match="started from base"):
        Term(TaskVector(vector.tensors, replace(vector.manifest, start="base")))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gguf", {}, "unknown export 'gguf'; choose one of pure, hf, peft, mergekit, coefficients"),
        ("hf", {"rank": 4}, "a rank or an energy is for the export to peft, not for 'hf'"),
        ("mergekit", {"energy": 0.5}, "not for 'mergekit'"),
        ("pure", {"onto": "start"}, "the export 'pure' has no place for a start model"),
        ("coefficients", {"dtype": "float32"}, "writes no tensors"),
        ("hf", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("peft", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("peft", {"rank": 4, "energy": 0.5}, "not both"),
    ],
)
def test_options_that_a_kind_does_not_use_are_refused(tmp_path, models, kind, options, message):
    refused(tmp_path, LataError, message, kind, [Term(vector_of(models))], **options)


@pytest.mark.parametrize("kind", ["pure", "coefficients"])
def test_what_is_not_added_to_a_model_has_no_scale(tmp_path, models, kind):
    refused(tmp_path, LataError, r"has no place for a scale \(0.5 of ", kind, [Term(vector_of(models), 0.5)])


def test_nothing_to_export_is_refused(tmp_path):
    refused(tmp_path, LataError, "there is nothing to export", "hf", [])


@pytest.mark.parametrize("kind", ["hf", "mergekit"])
def test_a_start_recorded_by_a_relative_path_is_asked_for_where_it_cannot_be_read_from(tmp_path, models, monkeypatch, kind):
    monkeypatch.chdir(models["start"].parent)
    TaskVector.between(models["start"].name, models["one"].name).save(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    terms = [Term(TaskVector.open(tmp_path / "saved"))]
    with pytest.raises(
        SourceError, match=r"records its start model as start, which is not there, seen from .*elsewhere: name it .*--onto MODEL"
    ):
        export_to(kind, terms, tmp_path / "out")
    export_to(kind, terms, tmp_path / "out", onto=models["start"])
