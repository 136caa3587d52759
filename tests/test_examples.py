import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lata_lightning import TaskVector
from lata_lightning.quickstart.experts import INSTRUCT

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example, *arguments, cwd, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cwd / "cache")}
    command = [sys.executable, *launcher, EXAMPLES / example, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and f'"{path.name}"' not in tests] == []


def test_a_plain_trainer_leaves_a_vector_and_its_history_can_be_drawn(tmp_path):
    printed = run("plain_trainer.py", "out", cwd=tmp_path)
    assert "blocks of model.layers" in printed
    assert re.search(r"^ *7 ", printed, re.MULTILINE)
    assert TaskVector.open(tmp_path / "out/task_vector").manifest.coefficients is not None
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) > 4
    pytest.importorskip("matplotlib")
    run("plot_history.py", "out/history.jsonl", "figure.png", cwd=tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_custom_rule_names_the_layers(tmp_path):
    printed = run("custom_layers.py", cwd=tmp_path)
    # The stage that moved most is the least aligned, and gets the whole of its vector.
    assert "stage3" in printed.splitlines()[2]
    assert printed.splitlines()[2].endswith("coefficient 1.00")
    assert printed.splitlines()[0].endswith("coefficient 0.33")


def test_attention_only_trains_four_tensors_a_block_and_learns(tmp_path):
    printed = run("attention_only.py", "out", cwd=tmp_path)
    assert "trained: 32 of 75 tensors" in printed
    before, after = map(float, re.search(r"right: (\S+) before, (\S+) after", printed).groups())
    assert before == 0
    assert after > 0.5
    vector = TaskVector.open(tmp_path / "out/task_vector")
    assert all(("self_attn" in name) == (name not in vector.unchanged) for name in vector)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    printed = run("resume.py", "out", cwd=tmp_path)
    assert "broken off: power cut" in printed
    assert "same vector: True, same history: True" in printed


def test_adapters_leave_the_vector_that_the_adapter_directory_stands_for(tmp_path):
    printed = run("lora.py", "out", cwd=tmp_path)
    # Three matrices in each of eight blocks.
    assert "24 of 75 tensors moved; vector and adapter differ by at most 0.0e+00" in printed
    assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_two_processes_of_torchrun_know_the_same_result(tmp_path):
    printed = run("fsdp2.py", "out", cwd=tmp_path, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    found = re.findall(r"^process (\d): alignment (0\.\d+)", printed, re.MULTILINE)
    assert sorted(rank for rank, _ in found) == ["0", "1"]
    assert len({alignment for _, alignment in found}) == 1
    assert TaskVector.open(tmp_path / "out/task_vector").manifest.step == 10


def test_a_module_without_a_transformer_has_its_repeated_children_as_layers(tmp_path):
    run("own_module.py", "out", cwd=tmp_path)
    vector = TaskVector.open(tmp_path / "out/task_vector")
    assert list(vector.manifest.coefficients) == [f"blocks.{number}" for number in range(4)]
    assert {"stem.weight", "head.bias"} <= set(vector)


def test_a_custom_rule_weights_the_layers_of_a_merge(tmp_path):
    printed = run("own_weighting.py", "out", cwd=tmp_path)
    own = {layer: float(value) for layer, value in re.findall(r"^(model\.layers\.\d): by relative norm (\d\.\d+)", printed, re.MULTILINE)}
    assert max(own.values()) == 1
    vector = TaskVector.open(tmp_path / "out/lata/task_vector")
    merged, start = (load_file(path / "model.safetensors") for path in (tmp_path / "out/merged", INSTRUCT))
    for layer, coefficient in own.items():
        name = f"{layer}.self_attn.q_proj.weight"
        expected = 0.8 * coefficient * vector[name]
        # The coefficient is printed to three places, and the sum is rounded to float32.
        torch.testing.assert_close(merged[name] - start[name], expected, rtol=2e-3, atol=1e-6)


def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "walk.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    # Progress bars go to standard error, and would stand in the middle of what is printed.
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert len(re.findall(r"^step \d+ ", printed, re.MULTILINE)) == 3
    assert re.search(r"^instruct .*^plain .*^linear ", printed, re.MULTILINE | re.DOTALL)


def test_a_sequence_of_tasks_goes_on_where_it_was_and_shows_both_matrices(tmp_path):
    printed = run("continual.py", "out", 2, cwd=tmp_path)
    assert printed.count("average_accuracy") == printed.count("after     string       math") == 2
    stages = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/0*")}
    assert stages == {f"{rule}/{stage}" for rule in ("sequential", "merged") for stage in ("01-string", "02-math")}
    assert run("continual.py", "out", 2, cwd=tmp_path) == printed


def test_a_loop_of_plain_torch_stops_half_way_and_goes_on_with_its_start(tmp_path):
    printed = run("torch_loop.py", "out", cwd=tmp_path)
    assert re.findall(r"^step (\d+): norm \d", printed, re.MULTILINE) == ["2", "4", "6", "8"]
    assert TaskVector.open(tmp_path / "out/task_vector").manifest.step == 8
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) == 4


def test_two_processes_of_fabric_with_shards_measure_the_same(tmp_path):
    printed = run("fabric.py", "out", 2, "fsdp2", cwd=tmp_path)
    # Two processes write to one pipe, where the end of a line may follow a line of the other.
    found = re.findall(r"process (\d), step (\d+): least aligned (0\.\d{6})", printed)
    assert sorted({(rank, step) for rank, step, _ in found}) == [(rank, step) for rank in "01" for step in ("4", "8")]
    assert all(len({value for _, step, value in found if step == wanted}) == 1 for wanted in ("4", "8"))
    assert TaskVector.open(tmp_path / "out/task_vector").manifest.alignment is not None


def test_the_trainer_of_transformers_leaves_a_vector_beside_its_checkpoints(tmp_path):
    printed = run("hf_trainer.py", "out", cwd=tmp_path)
    assert "lata/alignment" in printed
    assert TaskVector.open(tmp_path / "out/lata/task_vector").manifest.coefficients is not None


def test_a_run_stops_when_its_vector_turns_against_that_of_another_expert(tmp_path):
    printed = run("stop_on_conflict.py", "out", cwd=tmp_path)
    epochs, value = re.search(r"stopped after epoch (\d) of 8: cosine (0\.\d+)", printed).groups()
    cosines = [json.loads(line)["cosine/sums"] for line in (tmp_path / "out/others/history.jsonl").read_text().splitlines()]
    assert 3 <= int(epochs) == len(cosines) < 8
    assert f"{cosines[-1]:.3f}" == value
    assert max(cosines) == cosines[-3]
