import json
import shlex

import peft
import pytest
import torch
from lightning_models import EXPECTED_WARNINGS, Module, batches, trainer
from tiny_models import read_back, same_bits
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector, Term, merge
from lata_lightning.cli.main import main
from lata_lightning.merging.weigh import weigh
from lata_lightning.store.writer import PARTIAL_MARK

pytestmark = EXPECTED_WARNINGS


def run(directory, models, export, *, model=None, instruction=True, **options):
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct") if model is None else model)
    vector = models / "instruction" if instruction else None
    callback = LATACallback(vector, output_dir=directory / "lata", export=export, table=False, **options)
    trainer(directory, callback).fit(module, batches())
    return module, directory / "lata"


def test_a_model_directory_at_the_end_of_training_is_what_merging_the_exported_vector_gives(tmp_path, models):
    _, output = run(tmp_path, models, ("vector", "hf"), weighting="linear")
    merge(models / "instruct", [Term(weigh(TaskVector.open(output / "task_vector"), "stored"))], tmp_path / "merged")
    assert same_bits(read_back(output / "hf"), read_back(tmp_path / "merged"))
    LlamaForCausalLM.from_pretrained(output / "hf")


def test_everything_that_is_asked_for_is_there_and_nothing_half_written(tmp_path, models):
    _, output = run(tmp_path, models, ("coefficients", "pure", "peft", "hf", "mergekit", "vector"), weighting="log")
    assert {"task_vector", "pure", "hf", "peft", "mergekit", "coefficients"} <= {path.name for path in output.iterdir()}
    assert not list(output.glob(f".*{PARTIAL_MARK}*"))
    pure, vector = TaskVector.open(output / "pure"), TaskVector.open(output / "task_vector").pure()
    assert all(torch.equal(pure[name], vector[name]) for name in vector)
    assert (output / "task_vector/README.md").read_text().count("# task_vector\n") == 1


def test_a_lora_run_leaves_the_adapter_whose_layers_are_weighted(tmp_path, models):
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(models / "instruct"), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    )
    _, output = run(tmp_path, models, ("vector", "peft"), model=model)
    vector = TaskVector.open(output / "task_vector")
    assert set(vector.manifest.coefficients.values()) != {1.0}
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "instruct").double(), output / "peft")
    merged, start = loaded.merge_and_unload().state_dict(), LlamaForCausalLM.from_pretrained(models / "instruct").double().state_dict()
    for name in vector:
        expected = vector[name].double() * vector.coefficient_of(name)
        torch.testing.assert_close(merged[name] - start[name], expected, rtol=1e-5, atol=1e-9)


def test_a_run_from_base_hands_over_onto_the_instruct_model(tmp_path, models):
    model = LlamaForCausalLM.from_pretrained(models / "base")
    _, output = run(tmp_path, models, ("vector", "hf"), model=model, start="base", weighting="linear")
    instruction = TaskVector.open(models / "instruction")
    vector = weigh(TaskVector.open(output / "task_vector"), "stored")
    merge(models / "instruct", [Term(vector.without(instruction))], tmp_path / "merged")
    merged, expected = read_back(output / "hf"), read_back(tmp_path / "merged")
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("export", ["vector", ("vector", "onnx")])
def test_exports_are_named_by_a_sequence_of_known_words(export):
    with pytest.raises(LataError, match=r"export must be a sequence of words among vector, pure, hf, peft, mergekit, coefficients"):
        LATACallback(export=export)


def test_the_export_of_another_run_is_not_replaced(tmp_path, models):
    (tmp_path / "lata/hf").mkdir(parents=True)
    with pytest.raises(LataError, match="holds the hf of another run"):
        run(tmp_path, models, ("hf",))


# --- nothing is weighted silently ------------------------------------------------------------------------------------------------------------


def lines(caplog):
    return [record.getMessage().removeprefix("LATACallback: ") for record in caplog.records if "LATACallback: " in record.getMessage()]


def test_flat_alignments_weight_no_export_unless_a_rule_is_asked_for(tmp_path, models, caplog):
    with caplog.at_level("INFO"):
        module, output = run(tmp_path, models, ("vector", "hf", "pure"))
    vector = TaskVector.open(output / "task_vector")
    assert vector.manifest.alignment.flat
    assert vector.manifest.weighting == "linear"
    trained, start, exported = (
        dict(model.named_parameters())
        for model in (module.model, *(LlamaForCausalLM.from_pretrained(path) for path in (models / "instruct", output / "hf")))
    )
    for name, tensor in trained.items():
        # The whole difference is added, so the export is what training ended with.
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-7)
    moved = trained["lm_head.weight"] - start["lm_head.weight"]
    torch.testing.assert_close(TaskVector.open(output / "pure")["lm_head.weight"], moved.detach(), rtol=0, atol=1e-7)
    (ranking,) = [line for line in lines(caplog) if line.startswith("ranking: ")]
    assert ranking.endswith("every tensor has coefficient 1 in pure, hf, as no weighting was asked for (weighting=…)")


def test_the_closing_lines_name_what_was_written_and_the_commands_that_go_on(tmp_path, models, caplog):
    with caplog.at_level("INFO"):
        _, output = run(tmp_path, models, ("vector",))
    wrote, ranking, following = lines(caplog)[-3:]
    assert wrote == f"wrote {output / 'task_vector'}"
    assert sum("too little to rank the layers by" in line for line in lines(caplog)) == 1
    assert ranking.endswith("Below it is plain task arithmetic; --weighting linear ranks them all the same")
    merged, report, several = (shlex.split(command) for command in following.removeprefix("next: ").split("; "))
    assert merged[2:] == [str(models / "instruct"), str(output / "task_vector"), "--weighting", "none", "--output", "MERGED"]
    target = tmp_path / "merged"
    assert main([*merged[1:-1], str(target)]) == 0
    assert (target / "model.safetensors").is_file()
    assert report == ["lata", "report", str(output), "--output", "report.html"]
    words = several[several.index("lata") :]
    assert " ".join(several[: several.index("lata")]) == "with vectors of other tasks"
    assert words[:5] == ["lata", "merge", str(models / "instruct"), str(output / "task_vector"), "OTHER"]
    given = [str(output / "task_vector") if word == "OTHER" else word for word in words[1:-1]]
    assert main([*given, str(tmp_path / "several")]) == 0
    assert json.loads((tmp_path / "several/merge.json").read_text())["derivation"]["name"] == "regression without samples"


def test_the_next_command_of_a_run_from_base_gives_the_instruction_vector(tmp_path, models, caplog):
    with caplog.at_level("INFO"):
        _, output = run(tmp_path, models, ("vector",), model=LlamaForCausalLM.from_pretrained(models / "base"), start="base")
    words = shlex.split(lines(caplog)[-1].removeprefix("next: ").split("; ")[0])[2:]
    assert words[:4] == ["INSTRUCT", str(output / "task_vector"), "--instruction", str(models / "instruction")]
    assert main(["merge", str(models / "instruct"), *words[1:-1], str(tmp_path / "merged")]) == 0


def by_depth(alignment):
    return {layer: number / 10 for number, layer in enumerate(alignment.layers)}


def test_a_rule_of_ones_own_weights_the_exports_and_is_recorded(tmp_path, models):
    module, output = run(tmp_path, models, ("vector", "hf"), weighting=by_depth)
    vector = TaskVector.open(output / "task_vector")
    assert vector.manifest.weighting == "by_depth"
    assert list(vector.manifest.coefficients.values()) == [0.0, 0.1, 0.2]
    (term,) = json.loads((output / "hf/merge.json").read_text())["terms"]
    assert (term["weighting"], term["coefficients"]) == ("by_depth", vector.manifest.coefficients)
    trained, start, exported = (
        model.get_parameter("model.layers.2.mlp.up_proj.weight").double()
        for model in (module.model, *(LlamaForCausalLM.from_pretrained(path) for path in (models / "instruct", output / "hf")))
    )
    torch.testing.assert_close(exported, start + 0.2 * (trained - start), rtol=0, atol=1e-7)


@pytest.mark.parametrize("given", [{}, RuntimeError("no such layer")])
def test_what_was_trained_is_saved_also_where_a_rule_of_ones_own_fails(tmp_path, models, given):
    def failing(alignment):
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.warns(match="exported without coefficients: "):
        _, output = run(tmp_path, models, ("vector", "pure"), weighting=failing)
    vector = TaskVector.open(output / "task_vector")
    assert vector.manifest.coefficients is None
    assert vector.manifest.alignment is not None
    assert torch.equal(TaskVector.open(output / "pure")["lm_head.weight"], vector["lm_head.weight"])


def test_a_rule_without_a_name_is_refused_before_training():
    with pytest.raises(LataError, match="recorded by the name of its function"):
        LATACallback(weighting=lambda alignment: {})
