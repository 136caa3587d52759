"""How the start weights are kept: read again, copied, spilled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import EXPECTED_WARNINGS, Module, batches, shifted, tiny_llama, trainer
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector
from lata_lightning.store.hashing import value_sums

pytestmark = EXPECTED_WARNINGS


def fit(directory, models, provider, *callbacks, module=None, resume=None, **options):
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct")) if module is None else module
    callback = LATACallback(models / "instruction", base_weights=provider, output_dir=directory / "lata", table=False)
    trainer(directory, callback, *callbacks, **options).fit(module, batches(), ckpt_path=resume)
    return callback, module


@pytest.mark.parametrize("provider", ["auto", "source", "memory", "spill", "path"])
def test_every_way_of_keeping_them_gives_the_same_vector(tmp_path, models, provider):
    callback, module = fit(tmp_path, models, str(models / "instruct") if provider == "path" else provider)
    module.model.save_pretrained(tmp_path / "tuned")
    exported, expected = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(models / "instruct", tmp_path / "tuned")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert exported.manifest.start_identity.location == str(models / "instruct")
    copied = sum(parameter.nbytes for parameter in module.model.parameters())
    assert callback.run.tracker.start_weights.copied_bytes == (copied if provider == "memory" else 0)


def test_a_model_that_was_changed_since_it_was_loaded_is_copied(tmp_path, models):
    model = LlamaForCausalLM.from_pretrained(models / "instruct")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    callback, _ = fit(tmp_path, models, "auto", module=Module(model))
    assert callback.run.tracker.start_weights.copied_bytes == model.lm_head.weight.nbytes


def test_files_that_change_while_training_runs_are_noticed(tmp_path, models):
    class Overwrite(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.model.save_pretrained(tmp_path / "start")

    shutil.copytree(models / "instruct", tmp_path / "start")
    module = Module(LlamaForCausalLM.from_pretrained(tmp_path / "start"))
    with pytest.raises(LataError, match="were changed while training ran"):
        fit(tmp_path, models, "auto", Overwrite(), module=module)


@pytest.mark.parametrize(
    ("provider", "message"),
    [("source", "base_weights='source' needs"), ("lora", "base_weights='lora' needs"), ("memori", "does not exist")],
)
def test_what_cannot_be_done_is_refused_before_training(tmp_path, models, provider, message):
    module = Module(shifted(tiny_llama(), 1))
    with pytest.raises(LataError, match=message):
        fit(tmp_path, models, provider, module=module)
    assert module.losses == []


def test_spilled_files_are_there_while_training_runs_and_gone_afterwards(tmp_path, models):
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(sorted(path.name for path in (tmp_path / "lata/start_weights").iterdir()))

    fit(tmp_path, models, "spill", Look())
    assert seen == [["rank-00000-000.safetensors"]] * 2
    assert not (tmp_path / "lata/start_weights").exists()


class Built(Module):
    """Builds its model only in configure_model, where no hook sees the start weights of a resumed run."""

    def __init__(self, start):
        super().__init__(None)
        self.start = start

    def configure_model(self):
        if self.model is None:
            self.model = LlamaForCausalLM.from_pretrained(self.start) if self.start else tiny_llama(seed=8)


def test_a_model_built_in_configure_model_resumes_from_its_spilled_start(tmp_path, models):
    whole = fit(tmp_path / "whole", models, "memory", max_epochs=2)[0]

    # The first part is broken off, as by a full queue: its spilled files stay.
    class Break(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyError("broken off")

    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}")
    with pytest.raises(KeyError, match="broken off"):
        fit(tmp_path, models, "spill", checkpoint, Break(), module=Built(models / "instruct"), enable_checkpointing=True)
    resumed = fit(tmp_path, models, "spill", module=Built(None), resume=tmp_path / "epoch=0.ckpt", max_epochs=2)[0]
    assert resumed.alignment == whole.alignment
    with pytest.raises(LataError, match="cannot be had any more"):
        fit(tmp_path, models, "memory", module=Built(None), resume=tmp_path / "epoch=0.ckpt", max_epochs=2)


def test_a_run_spilled_by_two_processes_goes_on_in_one(tmp_path, models):
    script = Path(__file__).with_name("ddp_run.py")
    command = [sys.executable, script, models, tmp_path, "spill"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert "broken off" in done.stderr, done.stderr[-3000:]
    assert len(list((tmp_path / "lata/start_weights").iterdir())) == 2
    module = Module(tiny_llama(seed=8))
    _, module = fit(tmp_path, models, "spill", module=module, resume=tmp_path / "kept/last.ckpt", max_epochs=2)
    module.model.save_pretrained(tmp_path / "tuned")
    exported, expected = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(models / "instruct", tmp_path / "tuned")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fingerprints_of_parts_add_up_to_that_of_the_whole(dtype):
    whole = torch.randn(1001).to(dtype)
    assert torch.equal(value_sums(whole[:300]) + value_sums(whole[300:300]) + value_sums(whole[300:]), value_sums(whole))
    changed = whole.clone()
    changed[7] += 1
    assert not torch.equal(value_sums(changed), value_sums(whole))
