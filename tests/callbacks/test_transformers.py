"""The face for transformers' Trainer and for TRL's SFTTrainer, against whole float64 vectors and against uninterrupted runs."""

import json

import datasets
import peft
import pytest
import torch
from lightning_models import Module, batches, trainer
from tiny_models import read_back, same_bits
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lata_lightning import LATACallback, LataError, TaskVector, align
from lata_lightning.callbacks.transformers import LATATrainerCallback

pytestmark = [
    # Neither a loader of a few rows nor a CPU has memory to pin.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    # peft and TRL ask transformers for activation checkpointing under an older name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def data():
    tokens = torch.randint(3, 32, (12, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def load(models, name="instruct"):
    return LlamaForCausalLM.from_pretrained(models / name)


def arguments(directory, **options):
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no", "report_to": [], "logging_steps": 2,
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(directory / "trainer"), **{**settings, **options})


def fit(directory, models, data, *, model=None, lata=None, before=(), after=(), resume=None, kind=Trainer, more=None, log=True, **options):
    callback = LATATrainerCallback(models / "instruction", **{"output_dir": directory / "lata", "table": False, **(lata or {})})
    run = kind(
        model or load(models), arguments(directory, **options), train_dataset=data, callbacks=[*before, callback, *after], **(more or {})
    )
    if log:
        callback.log_to(run)
    run.train(resume_from_checkpoint=resume)
    return run, callback


def history(directory):
    return [json.loads(line) for line in (directory / "lata/history.jsonl").read_text().splitlines()]


def flat(tensors, prefix=""):
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors) if name.startswith(prefix)])


def minus(one, other):
    other = dict(other.named_parameters())
    return {name: parameter.detach().double() - other[name].detach().double() for name, parameter in one.named_parameters()}


def cosine(one, other, prefix=""):
    return torch.nn.functional.cosine_similarity(flat(one, prefix), flat(other, prefix), dim=0).item()


# --- numbers and what is left behind -------------------------------------------------------------------------------------------------------


def test_figures_and_vector_are_those_of_whole_float64_vectors(tmp_path, models, data):
    run, callback = fit(tmp_path, models, data)
    task, instruction = minus(run.model, load(models)), minus(load(models), load(models, "base"))
    complex_vector = {name: task[name] + instruction[name] for name in task}
    for layer, value in callback.alignment.values.items():
        assert value == pytest.approx(cosine(complex_vector, instruction, f"{layer}."), abs=1e-6)
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    assert all(torch.equal(vector[name].double(), task[name].float().double()) for name in task)
    assert (vector.manifest.step, vector.manifest.epoch) == (12, 2)
    assert [(row["step"], row["epoch"]) for row in history(tmp_path)] == [(6, 0), (12, 1)]
    assert [measured.to_json() for measured in callback.history] == history(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1}, {"bf16": True}], ids=["plain", "accumulated", "bf16"]
)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, models, data, options):
    plain = Trainer(load(models), arguments(tmp_path / "plain", **options), train_dataset=data)
    plain.train()
    watched, _ = fit(tmp_path / "watched", models, data, lata={"every_n_train_steps": 1}, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (plain, watched)]
    assert losses[0] == losses[1] != []


def test_steps_are_optimizer_steps_where_gradients_are_accumulated(tmp_path, models, data):
    fit(tmp_path, models, data, gradient_accumulation_steps=2, lata={"every_n_train_steps": 2})
    assert [(row["step"], row["epoch"]) for row in history(tmp_path)] == [(2, 0), (3, 0), (4, 1), (6, 1)]


def test_evaluation_changes_nothing_and_the_end_is_measured_where_no_epoch_is(tmp_path, models, data):
    fit(tmp_path / "plain", models, data, lata={"every_n_epochs": 0})
    evaluated, _ = fit(
        tmp_path / "evaluated", models, data, lata={"every_n_epochs": 0}, more={"eval_dataset": data}, eval_strategy="steps", eval_steps=1
    )
    assert [row["step"] for row in history(tmp_path / "evaluated")] == [12]
    assert history(tmp_path / "plain") == history(tmp_path / "evaluated")
    assert any("eval_loss" in row for row in evaluated.state.log_history)


def test_figures_are_logged_through_the_trainer_and_by_its_loggers(tmp_path, models, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TaskVector.between(models / "base", models / "instruct").save(tmp_path / "other")
    import os

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    run, callback = fit(tmp_path, models, data, report_to=["tensorboard"], lata={"compare_with": {"other": tmp_path / "other"}})
    del os.environ["TENSORBOARD_LOGGING_DIR"]
    rows = [row for row in run.state.log_history if "lata/alignment" in row]
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[-1]["lata_layers/alignment/model.layers.2"] == callback.alignment.values["model.layers.2"]
    assert rows[-1]["lata/cosine/other"] == history(tmp_path)[-1]["cosine/other"]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/lata/alignment", "train/lata_layers/alignment/model.layers.0", "train/loss"} <= set(events.Tags()["scalars"])


def test_the_default_directory_lies_beside_the_checkpoints_and_the_state_in_the_trainer_says_where_a_run_is(tmp_path, models, data):
    fit(tmp_path, models, data, lata={"output_dir": None, "name": "skill"}, log=False)
    assert (tmp_path / "trainer/skill/task_vector/task_vector.json").is_file()


def test_adapters_of_peft_are_measured_in_their_factors(tmp_path, models, data):
    model = peft.get_peft_model(load(models), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    run, _ = fit(tmp_path, models, data, model=model)
    merged = run.model.merge_and_unload()
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    for name, expected in minus(merged, load(models)).items():
        torch.testing.assert_close(vector[name].double(), expected, rtol=1e-5, atol=1e-7)


# --- resume and the best model -------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends a run after a step as a crash does, once the checkpoint of that step is written."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "adapters"])
@pytest.mark.parametrize("step", [4, 6], ids=["in the middle of an epoch", "before the end of an epoch is measured"])
def test_a_resumed_run_ends_with_the_history_and_vector_of_the_uninterrupted_one(tmp_path, models, data, lora, step):
    def model():
        torch.manual_seed(5)
        return peft.get_peft_model(load(models), peft.LoraConfig(r=2, target_modules=["q_proj"])) if lora else load(models)

    options = {"save_strategy": "steps", "save_steps": 2, "lata": {"every_n_train_steps": 4}}
    fit(tmp_path / "whole", models, data, model=model(), **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "parts", models, data, model=model(), before=[Stop(step)], **options)
    fit(tmp_path / "parts", models, data, model=model(), resume=str(tmp_path / f"parts/trainer/checkpoint-{step}"), **options)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert same_bits(read_back(tmp_path / "parts/lata/task_vector"), read_back(tmp_path / "whole/lata/task_vector"))


def test_resuming_with_other_start_weights_or_without_the_state_is_refused(tmp_path, models, data):
    fit(tmp_path / "first", models, data, save_strategy="epoch")
    checkpoint = tmp_path / "first/trainer/checkpoint-6"
    with pytest.raises(LataError, match=r"cannot be had any more.*base_weights="):
        fit(tmp_path / "other", models, data, model=load(models, "base"), resume=str(checkpoint))
    fit(
        tmp_path / "mended",
        models,
        data,
        model=load(models, "base"),
        resume=str(checkpoint),
        lata={"base_weights": str(models / "instruct")},
    )
    assert same_bits(read_back(tmp_path / "mended/lata/task_vector"), read_back(tmp_path / "first/lata/task_vector"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (key,) = [key for key in state["stateful_callbacks"] if key.startswith("LATATrainerCallback")]
    del state["stateful_callbacks"][key]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(LataError, match="start|state"):
        fit(tmp_path / "without", models, data, resume=str(checkpoint))


def test_the_vector_is_that_of_the_best_checkpoint_where_that_is_loaded_at_the_end(tmp_path, models, data):
    other = datasets.Dataset.from_dict({"input_ids": [[5] * 8], "labels": [[5] * 8]})
    run, callback = fit(
        tmp_path, models, data, more={"eval_dataset": other}, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False, num_train_epochs=3,
    )  # fmt: skip
    best = run.state.best_global_step
    assert best < run.state.global_step
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    start, tuned = dict(load(models).named_parameters()), LlamaForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert vector.manifest.step == best
    assert all(torch.equal(vector[name], parameter.detach() - start[name].detach()) for name, parameter in tuned.named_parameters())
    assert [row["step"] for row in history(tmp_path)] == [6, 12, 18]
    measured = align(vector, TaskVector.open(models / "instruction"))
    assert callback.alignment.values == pytest.approx(measured.values, rel=1e-12)


# --- refusals ------------------------------------------------------------------------------------------------------------------------------


def test_the_lightning_callback_says_which_one_a_trainer_of_transformers_takes(tmp_path, models, data):
    with pytest.raises(LataError, match=r"lata_lightning\.callbacks\.transformers import LATATrainerCallback"):
        Trainer(load(models), arguments(tmp_path), train_dataset=data, callbacks=[LATACallback(models / "instruction")])


def test_this_callback_says_which_one_a_trainer_of_lightning_takes(tmp_path, models):
    with pytest.raises(LataError, match="from lata_lightning import LATACallback"):
        trainer(tmp_path, LATATrainerCallback(models / "instruction")).fit(Module(load(models)), batches())


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_models_that_accelerate_shards_are_refused_before_the_first_step(tmp_path, models, data, monkeypatch, name):
    callback = LATATrainerCallback(models / "instruction", output_dir=tmp_path / "lata")
    run = Trainer(load(models), arguments(tmp_path), train_dataset=data, callbacks=[callback])
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(LataError, match=rf"accelerate shards \({name}\).*lata extract START MODEL"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)
    assert not (tmp_path / "lata").exists()


def test_two_callbacks_need_names_and_directories_of_their_own(tmp_path, models, data):
    def pair(**second):
        first = LATATrainerCallback(output_dir=tmp_path / "one", table=False)
        other = LATATrainerCallback(**{"output_dir": tmp_path / "two", "table": False, **second})
        Trainer(load(models), arguments(tmp_path), train_dataset=data, callbacks=[first, other]).train()

    with pytest.raises(LataError, match="different names, and two are called 'lata'"):
        pair()
    with pytest.raises(LataError, match="output_dir of its own"):
        pair(name="second", output_dir=tmp_path / "one")
    pair(name="second")
    assert same_bits(read_back(tmp_path / "one/task_vector"), read_back(tmp_path / "two/task_vector"))


# --- TRL -----------------------------------------------------------------------------------------------------------------------------------


def test_trl_s_trainer_for_supervised_fine_tuning_is_measured_and_its_own_metrics_are_undisturbed(tmp_path, data):
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    from lata_lightning.quickstart.experts import BASE, INSTRUCT

    texts = datasets.Dataset.from_dict({"text": ["What is two and two? Four.", "Reverse the word: abc. cba."] * 4})

    def run(directory, *callbacks):
        options = {
            "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": [], "save_strategy": "no", "logging_steps": 2,
            "use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 32,
        }  # fmt: skip
        config = trl.SFTConfig(output_dir=str(directory), **options)
        made = trl.SFTTrainer(
            str(INSTRUCT), args=config, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(INSTRUCT), callbacks=list(callbacks),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        for callback in callbacks:
            callback.log_to(made)
        made.train()
        return made

    torch.manual_seed(0)
    plain = run(tmp_path / "plain")
    torch.manual_seed(0)
    callback = LATATrainerCallback((str(BASE), str(INSTRUCT)), output_dir=tmp_path / "lata", every_n_train_steps=1, table=False)
    watched = run(tmp_path / "watched", callback)
    own = [
        [
            {k: v for k, v in row.items() if "time" not in k and "runtime" not in k and "per_second" not in k}
            for row in made.state.log_history
            if "loss" in row
        ]
        for made in (plain, watched)
    ]
    assert own[0] == own[1]
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3, 4]
    start = dict(LlamaForCausalLM.from_pretrained(INSTRUCT).named_parameters())
    merged = watched.model.merge_and_unload()
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(vector[name], parameter.detach() - start[name].detach(), rtol=1e-3, atol=1e-6)
