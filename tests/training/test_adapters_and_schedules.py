"""What CausalLMModule does beyond plain full training: adapters, four bits, other schedules, less memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from passed_warnings import FEW_WORKERS, GRADIENT_CHECKPOINTING, LEAF_SPEC, NO_VALIDATION_LOADER
from peft import PeftModel
from tiny_models import llama
from torch.utils.data import DataLoader
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lata_lightning import LATACallback, TaskVector
from lata_lightning.errors import LataError
from lata_lightning.training.loading import load_causal_lm, with_adapters
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.optimizing import learning_rate_share

pytestmark = [FEW_WORKERS, LEAF_SPEC, GRADIENT_CHECKPOINTING, NO_VALIDATION_LOADER]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def batches():
    tokens = torch.randint(3, 24, (6, 2, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader([{"input_ids": rows, "labels": rows} for rows in tokens], batch_size=None)


@pytest.fixture
def directory(tmp_path):
    llama().save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def reference(schedule, steps, warmup):
    """The schedule transformers has under that name, as shares of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if schedule == "constant":
        found = get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        found = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[schedule](optimizer, warmup, steps)
    return [found.lr_lambdas[0](step) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_after_the_warm_up_a_schedule_is_that_of_transformers(schedule):
    shares = [learning_rate_share(step, 20, 4, 0.0, schedule) for step in range(21)]
    assert shares[4:] == pytest.approx(reference(schedule, 20, 4)[4:])
    # Its warm-up begins at nothing, ours a step later.
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_line_ends_at_the_share_asked_for():
    assert [learning_rate_share(step, 4, 0, 0.2, "linear") for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_training_without_an_end_needs_a_constant_schedule():
    for schedule in ("constant", "cosine"):
        module = CausalLMModule(llama(), schedule=schedule)
        module.trainer = SimpleNamespace(estimated_stepping_batches=math.inf)
        if schedule == "constant":
            assert module.configure_optimizers()["lr_scheduler"]["scheduler"].get_last_lr() == [1e-5, 1e-5]
        else:
            with pytest.raises(LataError, match="'cosine' falls towards the end of training: set max_epochs"):
                module.configure_optimizers()


def test_a_module_with_nothing_to_train_is_refused():
    with pytest.raises(LataError, match="nothing to train"):
        CausalLMModule(llama().requires_grad_(False)).configure_optimizers()


def test_adapters_are_trained_and_the_model_is_frozen(directory):
    module = CausalLMModule(directory, lora={"r": 2, "target_modules": ["q_proj"]}, learning_rate=1e-2)
    assert isinstance(module.model, PeftModel)
    assert module.model.training
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2
    assert all("q_proj.lora_" in name for name in trained)
    Trainer(max_epochs=1, **QUIET).fit(module, batches())
    start = dict(llama().named_parameters())
    tuned = dict(module.model.merge_and_unload().named_parameters())
    changed = [name for name in start if not torch.equal(start[name], tuned[name])]
    assert changed == [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(2)]


def test_a_checkpoint_of_adapters_holds_nothing_else_and_resumes(directory, tmp_path):
    def fit(epochs, resume=None):
        torch.manual_seed(3)
        module = CausalLMModule(directory, lora={"r": 2}, learning_rate=1e-2, schedule="constant")
        callback = LATACallback(output_dir=tmp_path / f"lata{epochs}{resume is None}", table=False)
        trainer = Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
        trainer.fit(module, batches(), ckpt_path=resume, weights_only=True if resume else None)
        return trainer, module

    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert kept
    assert all("lora_" in name for name in kept)
    _, whole = fit(2)
    _, resumed = fit(2, tmp_path / "half.ckpt")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    one, other = (TaskVector.open(tmp_path / f"lata2{fresh}/task_vector") for fresh in (True, False))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_adapters_on_a_tied_model_holds_neither_the_embedding_nor_the_head(tmp_path):
    llama(tied=True).save_pretrained(tmp_path / "start")
    module = CausalLMModule(str(tmp_path / "start"), lora={"r": 2, "target_modules": ["q_proj"]})
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, batches())
    assert any(name.endswith("lm_head.weight") for name in module.state_dict())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    kept = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == set(kept)


def test_checkpointed_gradients_are_those_of_stored_activations(directory):
    gradients = []
    for checkpointing in (False, True):
        module = CausalLMModule(directory, gradient_checkpointing=checkpointing)
        assert any(part.gradient_checkpointing for part in module.modules() if hasattr(part, "gradient_checkpointing")) == checkpointing
        module(**next(iter(batches()))).loss.backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


def test_adapters_learn_under_gradient_checkpointing(directory):
    module = CausalLMModule(directory, lora={"r": 2, "init_lora_weights": False}, gradient_checkpointing=True)
    module(**next(iter(batches()))).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters() if parameter.requires_grad)


def test_unknown_arguments_of_adapters_are_refused():
    with pytest.raises(LataError, match=r"arguments of peft.LoraConfig, unknown are 1: \['rank'\]"):
        with_adapters(llama(), {"rank": 4})


def test_modules_that_are_not_there_and_arguments_without_meaning_are_refused():
    for arguments in ({"target_modules": ["nowhere"]}, {"r": -1}):
        with pytest.raises(LataError, match="peft cannot put adapters into the model: "):
            with_adapters(llama(), arguments)


def test_four_bits_without_adapters_or_of_a_model_in_memory_are_refused(directory):
    for model, lora in ((directory, None), (llama(), {"r": 2})):
        with pytest.raises(LataError, match="it needs lora, and a model given by directory or hub id"):
            CausalLMModule(model, lora=lora, quantize=True)


def test_four_bits_without_bitsandbytes_are_refused(directory, monkeypatch):
    monkeypatch.setattr("lata_lightning.training.loading.find_spec", lambda name: None)
    with pytest.raises(LataError, match="pip install bitsandbytes"):
        load_causal_lm(directory, quantize=True)


def test_a_model_in_four_bits_is_trained_by_its_adapters(directory):
    pytest.importorskip("bitsandbytes")
    module = CausalLMModule(directory, lora={"r": 2, "target_modules": ["q_proj"]}, quantize=True, learning_rate=1e-2)
    assert type(module.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    Trainer(max_epochs=1, **QUIET).fit(module, batches())
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {name for name in before if "lora_" in name}
