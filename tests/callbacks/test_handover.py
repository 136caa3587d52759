import peft
import pytest
import torch
from lightning_models import Module, batches, trainer
from tiny_models import read_back, same_bits
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector, Term, merge
from lata_lightning.store.writer import PARTIAL_MARK

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def run(directory, models, export, *, model=None, instruction=True, **options):
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct") if model is None else model)
    vector = models / "instruction" if instruction else None
    callback = LATACallback(vector, output_dir=directory / "lata", export=export, table=False, **options)
    trainer(directory, callback).fit(module, batches())
    return module, directory / "lata"


def test_a_model_directory_at_the_end_of_training_is_what_merging_the_exported_vector_gives(tmp_path, models):
    _, output = run(tmp_path, models, ("vector", "hf"))
    merge(models / "instruct", [Term(TaskVector.open(output / "task_vector"))], tmp_path / "merged")
    assert same_bits(read_back(output / "hf"), read_back(tmp_path / "merged"))
    LlamaForCausalLM.from_pretrained(output / "hf")


def test_everything_that_is_asked_for_is_there_and_nothing_half_written(tmp_path, models):
    _, output = run(tmp_path, models, ("coefficients", "pure", "peft", "hf", "mergekit", "vector"))
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
    _, output = run(tmp_path, models, ("vector", "hf"), model=model, start="base")
    instruction = TaskVector.open(models / "instruction")
    merge(models / "instruct", [Term(TaskVector.open(output / "task_vector").without(instruction))], tmp_path / "merged")
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
