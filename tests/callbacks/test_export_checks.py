"""Exports that cannot be written are refused before the first step, whatever is wrong with them."""

import shutil

import pytest
import torch
from lightning_models import EXPECTED_WARNINGS, Module, batches, tiny_llama, trainer
from safetensors.torch import load_file, save_file
from tiny_models import read_back
from transformers import AutoModel, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector

pytestmark = EXPECTED_WARNINGS


def fit(directory, model, export, *, vector=None, lata=None, **options):
    module = Module(model)
    callback = LATACallback(vector, output_dir=directory / "lata", export=export, table=False, **(lata or {}))
    trainer(directory, callback, **options).fit(module, batches())
    return module


def refused(directory, model, export, match, **options):
    """Not one step is taken, and nothing is left but an empty directory."""
    taken = []
    model.register_forward_hook(lambda *_: taken.append(1))
    with pytest.raises(LataError, match=match):
        fit(directory, model, export, **options)
    assert taken == []
    assert not (directory / "lata").is_dir() or list((directory / "lata").iterdir()) == []


@pytest.fixture
def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


ONTO_START = ["hf", "peft", "mergekit"]


@pytest.mark.parametrize("kind", ONTO_START)
def test_a_start_that_lies_nowhere(tmp_path, instruct, kind):
    instruct.config._name_or_path = ""
    refused(
        tmp_path,
        instruct,
        (kind,),
        rf"export {kind} needs the start weights again.*was not loaded from a directory or hub id.*lata export VECTOR",
    )


@pytest.mark.parametrize("kind", ONTO_START)
def test_a_start_that_cannot_be_read(tmp_path, instruct, kind):
    instruct.config._name_or_path = str(tmp_path / "gone")
    refused(tmp_path, instruct, (kind,), rf"export {kind} needs the start weights again.*gone")


@pytest.mark.parametrize("kind", ONTO_START)
def test_a_model_that_was_changed_after_it_was_loaded(tmp_path, instruct, kind):
    with torch.no_grad():
        instruct.model.norm.weight.add_(1)
    refused(tmp_path, instruct, ("vector", kind), r"does not start from the values in .*instruct; .* 1: \['model.norm.weight'\]")


def test_a_frozen_tensor_that_was_changed_after_the_model_was_loaded(tmp_path, instruct):
    with torch.no_grad():
        instruct.model.embed_tokens.requires_grad_(False).weight.add_(1)
    refused(tmp_path, instruct, ("hf",), r"1: \['model.embed_tokens.weight'\]")


def test_weights_that_the_trainer_rounds(tmp_path, instruct):
    refused(tmp_path, instruct, ("hf",), "rounded ones, are in .*lower precision", precision="bf16-true")


def test_weights_that_the_trainer_need_not_round_are_exported(tmp_path, instruct):
    instruct.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    fit(tmp_path, model, ("hf",), precision="bf16-true")
    LlamaForCausalLM.from_pretrained(tmp_path / "lata/hf")


def test_a_model_with_more_tokens_than_its_start(tmp_path, instruct):
    instruct.resize_token_embeddings(40)
    refused(tmp_path, instruct, ("hf",), "32 rows in one and 40 in the other|40 rows in one and 32 in the other")


def test_a_pure_vector_without_an_instruction_vector(tmp_path, instruct):
    refused(tmp_path, instruct, ("vector", "pure"), "export pure needs coefficients.*instruction_vector=.*lata align")


@pytest.mark.parametrize("sign", ["+", "@"])
def test_a_path_that_mergekit_takes_for_something_else(tmp_path, models, sign):
    shutil.copytree(models / "instruct", tmp_path / f"my{sign}model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / f"my{sign}model")
    refused(tmp_path, model, ("mergekit",), r"mergekit takes \+ and @ in a path")


@pytest.mark.parametrize("kind", ["peft", "mergekit"])
def test_a_start_without_a_config(tmp_path, instruct, kind):
    (tmp_path / "bare").mkdir()
    save_file({name: tensor.clone() for name, tensor in instruct.state_dict().items()}, tmp_path / "bare/model.safetensors")
    instruct.config._name_or_path = str(tmp_path / "bare")
    refused(tmp_path, instruct, (kind,), "config.json")


def test_an_adapter_of_a_model_in_which_no_matrix_is_trained(tmp_path, instruct):
    instruct.requires_grad_(False)
    instruct.model.norm.requires_grad_(True)
    refused(tmp_path, instruct, ("peft",), "a LoRA adapter needs a matrix to adapt")


def test_a_run_from_base_whose_instruct_model_is_gone(tmp_path, models):
    shutil.copytree(models / "instruct", tmp_path / "instruct")
    TaskVector.between(models / "base", tmp_path / "instruct", kind="instruction").save(tmp_path / "instruction")
    shutil.rmtree(tmp_path / "instruct")
    model = LlamaForCausalLM.from_pretrained(models / "base")
    refused(tmp_path, model, ("hf",), "instruct", vector=tmp_path / "instruction", lata={"start": "base"})


def test_an_output_directory_that_cannot_be_written_to(tmp_path, instruct):
    (tmp_path / "lata").touch()
    refused(tmp_path, instruct, ("vector",), "cannot be written to")


def test_a_model_whose_checkpoint_has_the_names_of_the_hub_is_exported(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "saved")
    (tmp_path / "gpt2").mkdir()
    shutil.copy(tmp_path / "saved/config.json", tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "saved/model.safetensors").items()}
    save_file(tensors, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    module = fit(tmp_path, GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), ("vector", "hf"), lata={"weighting": "none"})
    made = GPT2LMHeadModel.from_pretrained(tmp_path / "lata/hf").state_dict()
    for name, tensor in module.model.state_dict().items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)
    assert set(read_back(tmp_path / "lata/hf")) == set(tensors)


def test_a_random_model_is_trained_and_exported_as_a_vector(tmp_path):
    fit(tmp_path, tiny_llama(), ("vector", "coefficients"))
    assert {path.name for path in (tmp_path / "lata").iterdir()} == {"history.jsonl", "task_vector", "coefficients"}


def test_a_part_that_the_checkpoint_lacks_is_told_from_what_it_holds(tmp_path):
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path / "start")
    model = AutoModel.from_pretrained(tmp_path / "start")
    # The pooler is new, as the saved model has none.
    match = r"start and the model in training must hold the same tensors; on one side only are 2: \['pooler.*leave_out=…"
    refused(tmp_path, model, ("hf",), match)
