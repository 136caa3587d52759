"""Runs whose every figure is known beforehand: from whole float64 vectors, or from a run that nothing interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning_models import Module, batches, make_models, trainer
from tiny_models import read_back, same_bits
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback


def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


def values(model):
    """Copies of all parameters by name; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Recorded(Module):
    """Notes the weights after every batch by itself, under the step they belong to."""

    def __init__(self, model, learning_rate=0.05):
        super().__init__(model, learning_rate)
        self.states = {}

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.states[self.trainer.global_step] = {name.replace("_orig_mod.", ""): tensor for name, tensor in values(self.model).items()}


def same_batches(count=6):
    """Batches that are all alike, as Lightning goes on from the middle of an epoch with the first batch of the loader."""
    tokens = torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader(tokens.repeat(count, 1), batch_size=2)


def fit(directory, models, *, before=(), after=(), lata=None, module=None, data=None, val_data=None, resume=None, **options):
    """Fit a tiny Llama with LATACallback between other callbacks; results go to ``directory / "lata"``."""
    callback = LATACallback(models / "instruction", **{"output_dir": directory / "lata", "table": False, **(lata or {})})
    module = module or Recorded(instruct(models))
    run = trainer(directory, *before, callback, *after, **options)
    run.fit(module, data or batches(), val_data, ckpt_path=resume)
    return SimpleNamespace(trainer=run, module=module, callback=callback, directory=directory / "lata")


def history(directory):
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


def steps(directory):
    return [row["step"] for row in history(directory)]


def flat(tensors, prefix=""):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors) if name.startswith(prefix)])


def expected_vector(live, start, dtype=torch.float32):
    """Live minus start in the trainer's precision, as float32."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return {name: (live[name].to(wide) - start[name].to(dtype).to(wide)).float() for name in start}


def check_vector(directory, expected):
    """The stored deltas are these, bit for bit; a tensor that is not stored is one that did not change."""
    stored = read_back(directory / "task_vector")
    assert set(stored) <= set(expected)
    assert not any(expected[name].any() for name in set(expected) - set(stored))
    assert same_bits(stored, {name: expected[name] for name in stored})


def check_history(directory, states, start, models):
    """Every line tells of the weights after its step, as whole float64 vectors give it."""
    base, tuned = values(LlamaForCausalLM.from_pretrained(models / "base")), values(instruct(models))
    instruction = {name: tuned[name] - base[name] for name in base}
    for row in history(directory):
        task = {name: states[row["step"]][name].double() - start[name].double() for name in start}
        close(row["task_norm"], flat(task).norm())
        close(row["alignment"], cosine(task, instruction))
        for layer, figures in row["layers"].items():
            close(figures["alignment"], cosine(task, instruction, layer + "."))
            close(figures["task_norm"], flat(task, layer + ".").norm())


def cosine(task, instruction, prefix=""):
    direction = flat(instruction, prefix)
    return torch.nn.functional.cosine_similarity(flat(task, prefix) + direction, direction, dim=0)


def close(one, other):
    torch.testing.assert_close(torch.tensor(one, dtype=torch.float64), other.double(), rtol=1e-6, atol=1e-9)


def check(run, models, expected_steps, dtype=torch.float32):
    """History at these steps, vector and last measurement all tell of the weights that the module itself has recorded."""
    start = {name: tensor.to(dtype) for name, tensor in values(instruct(models)).items()}
    assert steps(run.directory) == expected_steps
    check_history(run.directory, run.module.states, start, models)
    last = run.module.states[max(run.module.states)]
    check_vector(run.directory, expected_vector(last, start, dtype))
    assert run.callback.alignment.values == {layer: row["alignment"] for layer, row in history(run.directory)[-1]["layers"].items()}
    assert no_leftovers(run.directory)


def no_leftovers(directory):
    return {path.name for path in directory.iterdir()} <= {"history.jsonl", "task_vector"}


def check_same(one, other):
    """Two runs left the same history and the same vector, bit for bit."""
    assert (one / "history.jsonl").read_text() == (other / "history.jsonl").read_text()
    assert same_bits(read_back(one / "task_vector"), read_back(other / "task_vector"))
    sides = [json.loads((side / "task_vector/task_vector.json").read_text()) for side in (one, other)]
    assert sides[0] == sides[1]


_KILLED = []


def killed_runs(factory):
    """Directories of runs killed at one file operation after another, ``run-*``, and of one that was not, ``whole``; see kill_run.py."""
    if not _KILLED:
        root = factory.mktemp("kills")
        (root / "models").mkdir()
        make_models(root / "models")
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        script = Path(__file__).with_name("kill_run.py")
        done = subprocess.run([sys.executable, script, root], env=environment, capture_output=True, text=True, timeout=240)
        assert (root / "whole/lata/task_vector").is_dir(), done.stderr[-3000:]
        _KILLED.append(root)
    return _KILLED[0]
