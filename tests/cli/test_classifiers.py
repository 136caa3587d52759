"""Classifiers of two tasks with heads of different sizes, from fit to merge to evaluate, by the commands alone."""

import json

import pytest
import torch
from classifier_runs import ENCODERS, FILTERS, TASKS, accuracy, encoder_config, fit
from safetensors.torch import load_file
from tokenizers_of_kinds import bert
from transformers import BertForSequenceClassification

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.store.head_files import Head

pytestmark = FILTERS


@pytest.fixture
def folder(classifiers, monkeypatch):
    monkeypatch.chdir(classifiers)
    return classifiers


@pytest.fixture
def lata(folder, capsys):
    def run(*words):
        capsys.readouterr()
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("start", ENCODERS)
def test_a_new_head_stays_out_of_the_vector_and_is_saved_beside_it_with_its_labels(folder, start):
    for task, classes in TASKS.items():
        run = folder / f"{start}-{task}/lata"
        assert set(TaskVector.open(run / "task_vector")) == {
            name for name in TaskVector.open(run / "task_vector") if "classifier" not in name and "cls." not in name
        }
        tensors = load_file(run / "head.safetensors")
        assert tensors["classifier.weight"].shape == (len(classes), 16)
        described = json.loads((run / "head.json").read_text())
        assert described["labels"] == sorted(classes)
        assert (described["architecture"], described["num_labels"]) == ("BertForSequenceClassification", len(classes))
        assert not list(run.glob(".*partial*"))


@pytest.mark.parametrize("start", ENCODERS)
def test_both_vectors_are_merged_onto_the_start_and_the_plain_encoder_and_scored_with_each_head(folder, lata, tmp_path, start):
    vectors = [f"{start}-{task}/lata/task_vector" for task in TASKS]
    for number, onto in enumerate(dict.fromkeys((start, "plain"))):
        merged = str(tmp_path / f"merged-{number}")
        status, _, said = lata("merge", onto, *vectors, "--weighting", "none", "--scale", "0.7", "--output", merged)
        assert status == 0, said
        heads = [f"{start}-{task}/lata" for task in TASKS]
        status, printed, said = lata("evaluate", merged, "--data", "three.jsonl", "five.jsonl", "--head", *heads, "--format", "json")
        assert status == 0, said
        expected = {task: {"accuracy": pytest.approx(accuracy(merged, f"{start}-{task}", task))} for task in TASKS}
        assert {name: {"accuracy": row["accuracy"]} for name, row in json.loads(printed).items()} == expected
        assert all(score["accuracy"].expected > 1 / len(TASKS[task]) for task, score in expected.items())


def test_one_head_scores_a_model_by_itself(folder, lata):
    status, printed, said = lata("evaluate", "plain", "--data", "five.jsonl", "--head", "plain-five/lata", "--format", "json")
    assert status == 0, said
    assert json.loads(printed)["five"]["accuracy"] == pytest.approx(accuracy("plain", "plain-five", "five"))


def test_a_scale_is_chosen_with_the_head_of_each_file(folder, lata, tmp_path):
    vectors, heads = [f"plain-{task}/lata/task_vector" for task in TASKS], [f"plain-{task}/lata" for task in TASKS]
    status, _, said = lata(
        "tune", "plain", *vectors, "--data", "three.jsonl", "five.jsonl", "--head", *heads, "--grid", "0.7", "--figure", "false",
        "--output", str(tmp_path / "tuned"),
    )  # fmt: skip
    assert status == 0, said
    assert lata("merge", "plain", *vectors, "--weighting", "none", "--scale", "0.7", "--output", str(tmp_path / "merged"))[0] == 0
    points = {point["scale"]: point["scores"] for point in json.loads((tmp_path / "tuned/tune.json").read_text())["points"]}
    for scale, model in ((0.0, "plain"), (0.7, tmp_path / "merged")):
        assert points[scale] == {task: pytest.approx(accuracy(str(model), f"plain-{task}", task)) for task in TASKS}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "three.jsonl"], "name a head that a fine-tune saved beside its task vector: --head RUN/lata"),
        (["--data", "three.jsonl", "--head", "plain-five/lata"], "the labels of three.jsonl must be classes of the model"),
        (["--data", "three.jsonl", "--head", "plain"], "plain must hold a head, head.safetensors and head.json; it lacks"),
        (["--data", "three.jsonl", "five.jsonl", "--head", "plain-three/lata", "plain-five/lata", "plain-five/lata"], "got 3 heads for 2 files"),
        (["--data", "prose.jsonl", "--head", "plain-three/lata"], "--head is for the accuracy of texts with labels"),
        (["--tasks", "arc_easy", "--head", "plain-three/lata"], "--head goes with --data FILE"),
        (["--data", "three.jsonl", "--head", "wide/lata"], "the head does not fit 'plain', which lacks these tensors or has them in another size"),
        (["--data", "three.jsonl", "--head", "llama/lata"], "the head of a llama model does not fit 'plain', which is a bert model"),
    ],
)  # fmt: skip
def test_a_head_that_is_missing_or_does_not_fit_is_one_clear_error(folder, lata, more, message):
    (folder / "prose.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    for name, kind, width in (("wide", "bert", 24), ("llama", "llama", 16)):
        (folder / f"{name}/lata").mkdir(parents=True, exist_ok=True)
        tensors = {"classifier.weight": torch.zeros(3, width), "classifier.bias": torch.zeros(3)}
        Head(tensors, kind, "BertForSequenceClassification", 3, ("high", "low", "mid")).save(folder / f"{name}/lata")
    status, _, said = lata("evaluate", "plain", *more)
    assert status == 1
    assert message in said.splitlines()[-1]


def test_labels_that_the_head_does_not_know_are_refused(folder, lata, tmp_path):
    (tmp_path / "odd.jsonl").write_text(
        json.dumps({"text": "abc", "label": "low"}) + "\n" + json.dumps({"text": "abc", "label": "blue"}) + "\n"
    )
    status, _, said = lata("evaluate", "plain", "--data", str(tmp_path / "odd.jsonl"), "--head", "plain-three/lata")
    assert status == 1
    assert "others are 1: ['blue']" in said


def test_a_resumed_run_saves_the_head_of_the_uninterrupted_one(folder):
    assert fit("plain", "three", "whole") == 0
    assert fit("plain", "three", "broken", "--trainer.max_epochs", "2") == 0
    for name in ("task_vector/task_vector.json", "task_vector/delta.safetensors", "head.json", "head.safetensors"):
        (folder / "broken/lata" / name).unlink()
    for leftover in (folder / "broken/lata/task_vector").iterdir():
        leftover.unlink()
    (folder / "broken/lata/task_vector").rmdir()
    assert fit("plain", "three", "broken", "--ckpt_path", "last") == 0
    one, other = (load_file(folder / name / "lata/head.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((folder / "broken/lata/head.json").read_text())["labels"] == sorted(TASKS["three"])


def test_a_stored_head_that_fits_stays_in_the_vector(folder):
    torch.manual_seed(1)
    BertForSequenceClassification(encoder_config(num_labels=3, id2label={0: "mid", 1: "low", 2: "high"})).save_pretrained("named")
    bert().save_pretrained("named")
    assert fit("named", "three", "kept", "--trainer.enable_checkpointing", "false") == 0
    assert "classifier.weight" in TaskVector.open("kept/lata/task_vector")
    assert not (folder / "kept/lata/head.json").exists()
