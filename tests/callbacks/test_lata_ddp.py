import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_models import shifted
from transformers import LlamaForCausalLM

from lata_lightning import TaskVector, align


@pytest.mark.parametrize("provider", ["auto", "memory"])
def test_two_ddp_processes_give_the_figures_of_the_saved_models_on_both_ranks(tmp_path, models, provider):
    other = TaskVector.between(models / "instruct", shifted(LlamaForCausalLM.from_pretrained(models / "instruct"), 4))
    if not (models / "other").exists():
        other.save(models / "other")
    script = Path(__file__).with_name("ddp_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, models, tmp_path, provider], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    exported = TaskVector.open(tmp_path / "lata/task_vector")
    extracted = TaskVector.between(models / "instruct", tmp_path / "tuned")
    assert all(torch.equal(exported[name], extracted[name]) for name in extracted)
    measured = align(extracted, TaskVector.open(models / "instruction"))
    assert exported.manifest.alignment.values == pytest.approx(measured.values, rel=1e-12)
    rows = [json.loads(line) for line in (tmp_path / "lata/history.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    sides = [torch.cat([vector[name].double().flatten() for name in sorted(other)]) for vector in (extracted, other)]
    assert rows[-1]["cosine/other"] == pytest.approx(torch.nn.functional.cosine_similarity(*sides, dim=0).item(), abs=1e-9)
