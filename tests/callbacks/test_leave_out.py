"""What LATACallback follows of a model: parts that are left out, and messages that name the part that is meant."""

import re

import lightning.pytorch as pl
import pytest
import torch
from conformance import Recorded
from lightning_models import EXPECTED_WARNINGS, Module, batches, tiny_llama, trainer
from torch import nn
from transformers import LlamaForCausalLM

from lata_lightning import AttentionOnlyFinetuning, LATACallback, LataError, TaskVector, Term, merge

pytestmark = EXPECTED_WARNINGS


def fit(directory, module, *callbacks, data=None, **options):
    callback = LATACallback(output_dir=directory / "lata", table=False, **options)
    run = trainer(directory, callback, *callbacks)
    run.fit(module, data or batches())
    return run, callback


@pytest.fixture
def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


@pytest.mark.parametrize("patterns", [["lm_head"], ["^lm_", "embed_tokens"], "lm_head|norm"])
def test_what_is_left_out_is_neither_measured_nor_exported(tmp_path, models, instruct, patterns):
    start = {name: parameter.detach().double().clone() for name, parameter in instruct.named_parameters()}
    run, callback = fit(tmp_path, Module(instruct), leave_out=patterns, instruction_vector=models / "instruction")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    kept = {name for name in start if not any(re.search(pattern, name) for pattern in patterns)}
    assert set(TaskVector.open(tmp_path / "lata/task_vector")) == kept
    live = dict(instruct.named_parameters())
    norm = sum((live[name].detach().double() - start[name]).square().sum() for name in kept).sqrt()
    assert run.callback_metrics["lata/task_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
    assert set(callback.alignment.values) == {f"model.layers.{index}" for index in range(3)}


def test_a_vector_without_a_head_is_merged_onto_a_model_with_a_head_of_its_own(tmp_path, models, instruct):
    fit(tmp_path, Module(instruct), leave_out=["lm_head"], base_weights="memory", export=("vector", "hf"))
    merge(models / "instruct", [Term(TaskVector.open(tmp_path / "lata/task_vector"))], tmp_path / "merged")
    start = LlamaForCausalLM.from_pretrained(models / "instruct").state_dict()
    for made in ("merged", "lata/hf"):
        merged = LlamaForCausalLM.from_pretrained(tmp_path / made).state_dict()
        assert torch.equal(merged["lm_head.weight"], start["lm_head.weight"])
        torch.testing.assert_close(merged["model.norm.weight"], instruct.state_dict()["model.norm.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("patterns", "match"),
    [(["score"], r"must match a tensor name of the model in training; without a match are 1: \['score'\]"), (["("], "regular expression")],
)
def test_a_pattern_that_can_be_no_part_of_the_model_is_refused_before_training(tmp_path, instruct, patterns, match):
    module = Module(instruct)
    with pytest.raises(LataError, match=match):
        fit(tmp_path, module, leave_out=patterns)
    assert module.losses == []


def test_tokens_added_in_training_are_refused_with_the_argument_that_leaves_them_out(tmp_path, models, instruct):
    instruct.resize_token_embeddings(40)
    module = Module(instruct)
    with pytest.raises(
        LataError,
        match=r"the instruction vector .* must fit the model in training: .*40.*leave_out=\['lm_head.weight', 'model.embed_tokens.weight'\]",
    ):
        fit(tmp_path, module, instruction_vector=models / "instruction")
    assert module.losses == []
    fit(tmp_path, module, instruction_vector=models / "instruction", leave_out=["lm_head.weight", "model.embed_tokens.weight"])
    assert TaskVector.open(tmp_path / "lata/task_vector").manifest.alignment is not None


def test_a_start_with_fewer_tokens_is_refused_with_the_argument_that_leaves_them_out(tmp_path, models, instruct):
    instruct.resize_token_embeddings(40)
    with pytest.raises(LataError, match=r"the start weights .* must fit the model in training: .*leave_out="):
        fit(tmp_path, Module(instruct), base_weights=str(models / "instruct"))


class GPT(nn.Module):
    """A model of one's own, as it is saved by its own script."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(32, 8), "h": nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2))}
        )

    def forward(self, tokens):
        values = self.transformer["wte"](tokens)
        for layer in self.transformer["h"]:
            values = layer(values)
        return values


class Wrapped(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.gpt, self.temperature, self.steps = GPT(), nn.Parameter(torch.ones(())), 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return (self.gpt(batch) * self.temperature).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def instruction_of_gpt(directory):
    base = GPT().state_dict()
    instruct = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) for name, tensor in base.items()}
    return TaskVector.between(base, instruct, kind="instruction").save(directory / "instruction")


def test_a_model_of_ones_own_in_an_attribute_is_named_by_the_error_that_asks_for_it(tmp_path):
    instruction = instruction_of_gpt(tmp_path)
    module = Wrapped()
    with pytest.raises(LataError, match=r"temperature.*name that model with model='gpt'"):
        fit(tmp_path, module, instruction_vector=instruction)
    assert module.steps == 0
    fit(tmp_path, module, instruction_vector=instruction, model="gpt")
    assert set(TaskVector.open(tmp_path / "lata/task_vector")) == set(instruction)


def test_a_trained_head_may_be_left_out_beside_attention_only_training(tmp_path, instruct):
    with pytest.raises(LataError, match="leave the head out with leave_out="):
        fit(tmp_path, Module(instruct), AttentionOnlyFinetuning(heads=["model.lm_head"]))
    fit(tmp_path, Module(instruct), AttentionOnlyFinetuning(heads=["model.lm_head"]), leave_out=["lm_head"])
    assert "lm_head.weight" not in TaskVector.open(tmp_path / "lata/task_vector")


def test_callbacks_of_one_name_that_are_added_later_are_told_apart_by_name(tmp_path, instruct):
    run = trainer(tmp_path, LATACallback(output_dir=tmp_path / "one"))
    run.callbacks.append(LATACallback(output_dir=tmp_path / "two"))
    with pytest.raises(LataError, match="two are called 'lata': give one another name="):
        run.fit(Module(instruct), batches())


@pytest.mark.parametrize(
    ("base_weights", "said"), [("spill", "30 tensors are written to .*start_weights: .* of disk"), ("memory", "copied to memory")]
)
def test_the_log_says_where_the_start_weights_are_kept(tmp_path, caplog, base_weights, said):
    fit(tmp_path, Recorded(tiny_llama()), base_weights=base_weights)
    (line,) = [record.message for record in caplog.records if "start weights:" in record.message]
    assert re.search(said, line)
