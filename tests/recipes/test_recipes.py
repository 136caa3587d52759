"""Every recipe is run: as its comment says on the shipped checkpoint, and on tiny models of other architectures, each for a few steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from passed_warnings import CHECKPOINTS_EXIST, EMPTY_LOADER, FEW_BATCHES, FEW_WORKERS, GRADIENT_CHECKPOINTING, JSONARGPARSE, LEAF_SPEC
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.quickstart.experts import INSTRUCT
from lata_lightning.quickstart.make_checkpoints import make_tokenizer

pytestmark = [FEW_WORKERS, LEAF_SPEC, FEW_BATCHES, GRADIENT_CHECKPOINTING, CHECKPOINTS_EXIST, EMPTY_LOADER, JSONARGPARSE]
ROOT = Path(__file__).parent.parent.parent
RECIPES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))}
FITS = [name for name, text in RECIPES.items() if "\nlata:" in text]
SHORT = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "3",
    "--trainer.limit_val_batches",
    "1",
]
CONFIGS = {"llama": (LlamaForCausalLM, LlamaConfig), "gemma2": (Gemma2ForCausalLM, Gemma2Config), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


def commands(name):
    """The commands in a recipe's comment, those that name something of one's own left out."""
    comment = "\n".join(line.removeprefix("#") for line in RECIPES[name].splitlines() if line.startswith("#"))
    found = re.findall(r"^   (lata .*)$", comment.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line)[1:] for line in found if not re.search(r"mine\.jsonl|…|google/|answerdotai/", line)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh directory: recipes have to be found from anywhere."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=list(CONFIGS))
def models(request, tmp_path_factory):
    """Base and instruct of a tiny model of one architecture, with a tokenizer."""
    directory = tmp_path_factory.mktemp(request.param)
    kind, config = CONFIGS[request.param]
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            pad_token_id=257, bos_token_id=None, eos_token_id=256,
        )
    )  # fmt: skip
    for name in ("base", "instruct"):
        model.save_pretrained(directory / name)
        make_tokenizer().save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return directory


def on(models):
    return ["--model.model", f"{models}/instruct", "--lata.instruction_vector", f"[{models}/base, {models}/instruct]"]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_opens_with_the_command_that_runs_it_and_explains_every_key(name):
    assert any(part == name for command in commands(name) for part in command)
    assert RECIPES[name].startswith("#")
    held = yaml.safe_load(RECIPES[name])
    assert held
    unexplained = [
        line
        for line in RECIPES[name].splitlines()
        if re.match(r" *(- )?\w+: +[^ #]", line) and "class_path:" not in line and " # " not in line and not line.startswith("#")
    ]
    assert unexplained == []


def test_the_fits_are_found():
    assert FITS == ["attention_only", "classify", "track_fsdp2", "track_full", "track_lora"]


def test_a_trial_of_a_recipe_writes_nothing(folder):
    assert main([*commands("debug")[0], *SHORT]) == 0
    assert not any(path.is_file() for path in (folder / "runs").rglob("*"))


@pytest.mark.parametrize("name", ["classify", "track_full", "track_lora"])
def test_a_recipe_runs_as_it_stands_and_goes_on_from_its_last_checkpoint(folder, name):
    command, checkpoint = commands(name)[0], f"runs/{name}/checkpoints/last.ckpt"
    assert main([*command, *SHORT]) == 0
    vector = TaskVector.open(folder / f"runs/{name}/lata/task_vector")
    assert vector.manifest.step == 3
    assert (vector.manifest.coefficients is None) == (name == "classify")
    assert (folder / f"runs/{name}/logs/version_0/metrics.csv").exists()
    if name == "classify":
        return
    assert main([*command, *SHORT, "--trainer.max_epochs", "2", "--ckpt_path", checkpoint]) == 0
    assert TaskVector.open(folder / f"runs/{name}/lata/task_vector").manifest.step == 6
    assert [json.loads(line)["step"] for line in (folder / f"runs/{name}/lata/history.jsonl").read_text().splitlines()] == [3, 6]


def test_only_the_attention_is_trained(folder):
    pytest.importorskip("lata_lightning.callbacks.attention_only")
    assert main([*commands("attention_only")[0], *SHORT]) == 0
    vector = TaskVector.open(folder / "runs/attention_only/lata/task_vector")
    assert {".self_attn." in name for name in vector if vector[name].any()} == {True}


@pytest.mark.parametrize("name", ["track_full", "track_lora"])
def test_a_recipe_runs_on_other_architectures(folder, models, name):
    assert main([*commands(name)[0], *SHORT, *on(models), "--output", "out", "--trainer.enable_progress_bar", "false"]) == 0
    vector = TaskVector.open(folder / "out/lata/task_vector")
    moved = [name for name in vector if vector[name].any()]
    assert sum("q_proj.weight" in name for name in moved) == 3
    assert any("embed_tokens" in name for name in moved) == (name == "track_full")
    assert len(vector.manifest.alignment.values) == 3


def test_shards_on_two_processes_give_the_vector_of_one_process(folder):
    (command, *_), script = commands("track_fsdp2"), Path(sys.executable).with_name("lata")
    # Every row has as many tokens, so the mean over both processes is the mean over all rows.
    rows = [{"prompt": f"next {number}", "completion": str(number + 1)} for number in range(100, 124)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command += [*SHORT, "--data.data", "rows.jsonl", "--data.validation_share", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, script, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*command, "--trainer.strategy", "auto", "--trainer.devices", "1", "--data.batch_size", "8", "--output", "alone"]) == 0
    sharded, whole = (TaskVector.open(path) for path in ("runs/track_fsdp2/lata/task_vector", "alone/lata/task_vector"))
    assert set(sharded) == set(whole)
    for name in whole:
        # Where a gradient is next to nothing, AdamW's first steps turn its rounding into a sign.
        assert torch.nn.functional.cosine_similarity(sharded[name].flatten(), whole[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize(("name", "output"), [("merge_pair", "runs/math_and_string"), ("unlearn", "runs/forgotten")])
def test_a_sequence_of_commands_leads_to_a_model(folder, name, output):
    for command in commands(name):
        assert main([*command, *(SHORT if command[0] == "fit" else [])]) == 0
    made, start = AutoModelForCausalLM.from_pretrained(output).state_dict(), AutoModelForCausalLM.from_pretrained(INSTRUCT).state_dict()
    assert any(not torch.equal(made[key], start[key]) for key in start)


def test_ones_own_conversations_lead_to_a_model_in_two_commands(folder):
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    fit, merge = (shlex.split(line)[1:] for line in commands.splitlines())
    rows = [[{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}!"}] for number in range(40)]
    (folder / "mine.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert main([*fit, *SHORT]) == main(merge) == 0
    made, start = (
        AutoModelForCausalLM.from_pretrained("runs/mine/model").state_dict(),
        AutoModelForCausalLM.from_pretrained(INSTRUCT).state_dict(),
    )
    vector = TaskVector.open("runs/mine/lata/task_vector")
    for name in vector:
        torch.testing.assert_close(made[name], start[name] + vector[name], rtol=0, atol=1e-6)


def test_the_page_on_recipes_lists_them_all():
    page = (ROOT / "docs/recipes.md").read_text("utf-8")
    assert [name for name in RECIPES if f"../recipes/{name}.yaml" not in page and name != "continual"] == []
