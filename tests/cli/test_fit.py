import json

import pytest
import torch
import yaml
from passed_warnings import CHECKPOINTS_EXIST, EMPTY_LOADER, FEW_BATCHES, FEW_WORKERS, GRADIENT_CHECKPOINTING, JSONARGPARSE, LEAF_SPEC
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.quickstart.make_checkpoints import make_tokenizer

pytestmark = [FEW_WORKERS, LEAF_SPEC, FEW_BATCHES, EMPTY_LOADER, CHECKPOINTS_EXIST, GRADIENT_CHECKPOINTING, JSONARGPARSE]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with a tiny base and instruct model, six conversations and a recipe."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            pad_token_id=257, bos_token_id=None, eos_token_id=256,
        )
    )  # fmt: skip
    for name in ("base", "instruct"):
        model.save_pretrained(name)
        make_tokenizer().save_pretrained(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    rows = [[{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": f"say {number}"}] for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe = {
        "model": {"init_args": {"model": "instruct", "learning_rate": 0.01, "schedule": "constant"}},
        "data": {"init_args": {"data": "rows.jsonl", "batch_size": 2}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
        "lata": {"instruction_vector": ["base", "instruct"], "table": False},
        "output": "out",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def fit(*more):
    return main(["fit", "--config", "recipe.yaml", *more])


def test_a_run_leaves_vector_history_checkpoint_metrics_and_configuration_in_one_directory(folder):
    assert fit() == 0
    assert {path.name for path in (folder / "out").iterdir()} == {"lata", "checkpoints", "logs"}
    vector = TaskVector.open(folder / "out/lata/task_vector")
    assert vector.manifest.step == 6
    assert set(vector.manifest.coefficients) == {"model.layers.0", "model.layers.1"}
    assert len((folder / "out/lata/history.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (folder / "out/checkpoints").iterdir()] == ["epoch=1-step=6.ckpt"]
    assert {"metrics.csv", "config.yaml"} <= {path.name for path in (folder / "out/logs/version_0").iterdir()}


def test_the_configuration_a_run_saves_gives_the_same_run_again(folder):
    assert (
        fit("--lata.level", "submodule", "--lata.every_n_train_steps", "2", "--model.lora", "{r: 2, target_modules: [q_proj, up_proj]}")
        == 0
    )
    saved = yaml.safe_load((folder / "out/logs/version_0/config.yaml").read_text())
    assert saved["lata"]["instruction_vector"] == ["base", "instruct"]
    assert saved["lata"]["level"] == "submodule"
    assert main(["fit", "--config", "out/logs/version_0/config.yaml", "--output", "again"]) == 0
    again = yaml.safe_load((folder / "again/logs/version_0/config.yaml").read_text())
    assert {**again, "output": "out"} == saved
    one, other = (TaskVector.open(folder / name / "lata/task_vector") for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.manifest.alignment == other.manifest.alignment
    assert (folder / "out/lata/history.jsonl").read_text() == (folder / "again/lata/history.jsonl").read_text()


def test_a_saved_instruction_vector_is_taken_by_its_path(folder):
    TaskVector.between("base", "instruct", kind="instruction").save("instruction")
    assert fit() == fit("--lata.instruction_vector", "instruction", "--output", "other") == 0
    one, other = (TaskVector.open(folder / name / "lata/task_vector").manifest for name in ("out", "other"))
    assert one.coefficients == other.coefficients


@pytest.mark.parametrize("more", [[], ["--model.lora", "{r: 2}"]], ids=["full", "lora"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(folder, more):
    assert fit(*more, "--output", "whole") == 0
    assert fit(*more, "--trainer.max_epochs", "1") == 0
    (checkpoint,) = (folder / "out/checkpoints").iterdir()
    assert fit(*more, "--ckpt_path", str(checkpoint)) == 0
    one, other = (TaskVector.open(folder / name / "lata/task_vector") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (folder / "whole/lata/history.jsonl").read_text() == (folder / "out/lata/history.jsonl").read_text()
    assert {path.name for path in (folder / "out/logs").iterdir()} == {"version_0", "version_1"}


def test_places_of_ones_own_are_kept(folder):
    callback = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: kept, save_last: true, save_top_k: 0}}"
    assert fit("--trainer.logger", "false", "--trainer.callbacks", f"[{callback}]", "--lata.output_dir", "measured") == 0
    assert (folder / "measured/task_vector").is_dir()
    assert [path.name for path in (folder / "kept").iterdir()] == ["last.ckpt"]
    assert [path.name for path in (folder / "out").iterdir()] == ["config.yaml"]


def test_another_module_is_named_after_a_recipe_without_the_arguments_of_the_first(folder):
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"word {number},{number % 3}\n" for number in range(6)))
    classes = [
        "--model",
        "SequenceClassificationModule",
        "--model.model",
        "instruct",
        "--model.num_labels",
        "3",
        "--lata.instruction_vector",
        "null",
    ]
    assert fit(*classes, "--data", "LabelledTextDataModule", "--data.data", "rows.csv") == 0
    assert "score.weight" not in TaskVector.open(folder / "out/lata/task_vector")
    assert (folder / "out/lata/head.safetensors").is_file()


def test_any_module_and_data_module_are_taken_by_their_class_path(folder):
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"word {number},{number % 3}\n" for number in range(6)))
    model = "lata_lightning.training.classification.SequenceClassificationModule"
    recipe = {
        "model": {"class_path": model, "init_args": {"model": "instruct", "num_labels": 3}},
        "data": {"class_path": "lata_lightning.training.labelled_data.LabelledTextDataModule", "init_args": {"data": "rows.csv"}},
    }
    (folder / "classes.yaml").write_text(yaml.safe_dump(recipe))
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "classes.yaml", *trainer, "--lata.table", "false"]) == 0
    assert "score.weight" not in TaskVector.open(folder / "run/lata/task_vector")
    assert json.loads((folder / "run/lata/head.json").read_text())["labels"] is None


def test_a_trial_run_leaves_nothing(folder):
    assert fit("--trainer.fast_dev_run", "2") == 0
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.data", "mine.jsonl"], "there is no file 'mine.jsonl'"),
        (["--model.model", "nowhere"], "cannot load 'nowhere' as a causal language model"),
        (["--model.lora", "{rank: 2}"], "unknown are 1: ['rank']"),
        (["--data.columns", "[question, answer]"], "the data has no column 'question', 'answer'; its columns are 'messages'"),
    ],
)
def test_an_error_in_the_input_is_one_line_and_status_1(folder, capsys, more, message):
    assert fit(*more) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lata: error: ")
    assert message in last


def no_model(*_, **__):
    raise AssertionError("a model was loaded")


def test_a_finished_run_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch):
    assert fit() == 0
    monkeypatch.setattr("lata_lightning.training.module.load_causal_lm", no_model)
    assert fit() == 1
    assert "out holds a finished run (out/lata/task_vector)" in capsys.readouterr().err


def interrupted(folder, monkeypatch):
    """A run that broke off after its first epoch, of which there is a checkpoint."""
    from lata_lightning import LATACallback

    whole = LATACallback.on_train_batch_start

    def fail(self, trainer, *hooks):
        if trainer.current_epoch == 1:
            raise RuntimeError("the power went off")
        whole(self, trainer, *hooks)

    with monkeypatch.context() as patch:
        patch.setattr(LATACallback, "on_train_batch_start", fail)
        with pytest.raises(RuntimeError, match="the power went off"):
            fit()


def test_an_unfinished_run_names_the_command_that_goes_on_and_that_ends_like_the_whole_one(folder, capsys, monkeypatch):
    assert fit("--output", "whole") == 0
    interrupted(folder, monkeypatch)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("lata_lightning.training.module.load_causal_lm", no_model)
        assert fit() == 1
    said = capsys.readouterr().err
    assert "out holds an unfinished run with the checkpoint epoch=0-step=3.ckpt. Go on with it: lata " in said
    resume = said.split("Go on with it: lata ")[1].split(". To begin anew")[0].split()
    assert main(resume) == 0
    one, other = (TaskVector.open(folder / name / "lata/task_vector") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (folder / "whole/lata/history.jsonl").read_text() == (folder / "out/lata/history.jsonl").read_text()


def test_the_same_command_with_last_serves_before_the_first_checkpoint_too(folder):
    assert fit("--ckpt_path", "last") == 0
    assert TaskVector.open(folder / "out/lata/task_vector").manifest.step == 6


def test_a_checkpoint_that_does_not_exist_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("lata_lightning.training.module.load_causal_lm", no_model)
    assert fit("--ckpt_path", "gone.ckpt") == 1
    assert "--ckpt_path must be a checkpoint, and gone.ckpt does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [["--lata.instruction_vector", "nowhere"], ["--data.data", "mine.jsonl"], ["--lata.base_weights", "lora"], ["--lata.export", "[pure]"]],
)
def test_a_start_that_fails_leaves_nothing(folder, more):
    status = fit(*more, *(["--lata.instruction_vector", "null"] if "[pure]" in more else []))
    assert status == 1
    assert not (folder / "out").exists()


def test_the_size_of_the_checkpoints_is_said_with_the_option_that_writes_none(folder, caplog):
    assert fit("--trainer.max_epochs", "1") == 0
    (checkpoint,) = (folder / "out/checkpoints").iterdir()
    said = next(record.message for record in caplog.records if "checkpoints of about" in record.message)
    # The tiny model is small beside the rest of the file.
    assert 0 < float(said.split("about ")[1].split(" GB")[0]) * 1e9 < checkpoint.stat().st_size
    assert fit("--trainer.enable_checkpointing", "false", "--output", "without") == 0
    assert {path.name for path in (folder / "without").iterdir()} == {"lata", "logs"}


def test_wrong_usage_exits_with_2(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        fit("--lata.levle", "block")
    assert "levle" in capsys.readouterr().err


def test_help_names_the_sections(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help-all"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lata [options] fit")
    assert all(option in printed for option in ("--lata.instruction_vector", "--output", "--trainer.max_epochs", "--ckpt_path"))


def test_a_dry_run_checks_the_output_and_trains_nothing(folder, capsys):
    before = sorted(path.name for path in folder.iterdir())
    assert fit("--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:4] == [
        "reads    instruct (directory)", "         rows.jsonl (file)", "         base (directory)", "writes   out",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "out/lata/task_vector").mkdir(parents=True)
    assert fit("--dry-run") == 1
    assert "out holds a finished run" in capsys.readouterr().err


def test_an_earlier_run_is_replaced_on_request_when_the_new_one_is_finished(folder, capsys):
    assert fit() == 0
    assert fit() == 1
    first = (folder / "out/lata/task_vector/task_vector.json").read_text()
    assert fit("--overwrite", "--model.learning_rate", "0.02") == 0
    assert (folder / "out/lata/task_vector/task_vector.json").read_text() != first
    assert [path.name for path in folder.glob("out*")] == ["out"]
    assert "overwrite" not in (folder / "out/logs/version_0/config.yaml").read_text()


def test_an_earlier_run_comes_back_if_the_new_one_leaves_no_checkpoint(folder, monkeypatch):
    assert fit() == 0
    first = (folder / "out/lata/task_vector/task_vector.json").read_text()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lata_lightning.training.module.CausalLMModule.on_train_epoch_start", interrupt, raising=False)
    assert fit("--overwrite") == 130
    assert (folder / "out/lata/task_vector/task_vector.json").read_text() == first
    assert [path.name for path in folder.glob("out*")] == ["out"]


def test_both_runs_stay_if_the_new_one_can_be_resumed(folder, monkeypatch, capsys):
    assert fit() == 0

    def interrupt(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("lata_lightning.training.module.CausalLMModule.on_train_epoch_start", interrupt, raising=False)
    assert fit("--overwrite") == 130
    assert sorted(path.name for path in folder.glob("out*")) == ["out", "out.before-1"]
    assert "go on with: lata fit --config recipe.yaml" in capsys.readouterr().err.splitlines()[-1]


def test_overwriting_a_run_refuses_what_it_would_lose(folder, capsys):
    assert fit() == 0
    assert fit("--overwrite", "--ckpt_path", "last") == 1
    assert "--overwrite begins a run anew, and --ckpt_path goes on with one" in capsys.readouterr().err
    (folder / "out/model").mkdir()
    assert fit("--overwrite") == 1
    assert "--overwrite replaces a run, and out also holds 1: ['model']" in capsys.readouterr().err
