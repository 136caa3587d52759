"""Classifiers of two tasks with heads of different sizes, from fit to merge to evaluate, by the commands alone."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers_of_kinds import bert
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.store.head_files import Head

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
SIZES = {"vocab_size": 270, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TASKS = {
    "three": {"low": "abc", "mid": "mno", "high": "xyz"},
    "five": {"e": "abc", "d": "fgh", "c": "klm", "b": "pqr", "a": "xyz"},
}
STARTS = ("plain", "masked", "headed")


def config(**more):
    return BertConfig(**SIZES, **STILL, initializer_range=0.2, max_position_embeddings=64, pad_token_id=256, **more)


def fit(start, task, output, *more):
    return main(
        [
            "fit", "--config", "classify", "--model.model", start, "--model.num_labels", str(len(TASKS[task])), "--model.learning_rate", "0.01",
            "--model.schedule", "constant", "--model.warmup_steps", "0", "--data.batch_size", "8",
            "--data.data", f"{task}.jsonl", "--data.validation_share", "0", "--trainer.max_epochs", "4", "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--output", output, *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Encoders without a head, with a masked-language head and with a head of four classes; two tasks, and a fine-tune of each on each start."""
    import datasets

    directory = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    encoder = BertModel(config())
    for name, model in zip(STARTS, (encoder, BertForMaskedLM(config()), BertForSequenceClassification(config(num_labels=4))), strict=True):
        model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        model.save_pretrained(directory / name)
        bert().save_pretrained(directory / name)
    generator = random.Random(0)
    for task, classes in TASKS.items():
        rows = [{"text": "".join(generator.choices(letters, k=5)), "label": label} for _ in range(12) for label, letters in classes.items()]
        (directory / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
        patch.chdir(directory)
        for start in STARTS:
            for task in TASKS:
                assert fit(start, task, f"{start}-{task}", "--trainer.enable_checkpointing", "false") == 0
    return directory


@pytest.fixture
def folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


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


def rows_of(task):
    return [json.loads(line) for line in Path(f"{task}.jsonl").read_text().splitlines()]


def accuracy(encoder, run, task):
    """What transformers itself gives for an encoder with the head of a run, one text at a time."""
    labels = sorted(TASKS[task])
    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=len(labels), ignore_mismatched_sizes=True).eval()
    missing = model.load_state_dict(load_file(f"{run}/lata/head.safetensors"), strict=False)
    assert not missing.unexpected_keys
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        found = [labels[model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()] == row["label"] for row in rows_of(task)]
    return sum(found) / len(found)


@pytest.mark.parametrize("start", STARTS)
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


@pytest.mark.parametrize("start", STARTS)
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
    BertForSequenceClassification(config(num_labels=3, id2label={0: "mid", 1: "low", 2: "high"})).save_pretrained("named")
    bert().save_pretrained("named")
    assert fit("named", "three", "kept", "--trainer.enable_checkpointing", "false") == 0
    assert "classifier.weight" in TaskVector.open("kept/lata/task_vector")
    assert not (folder / "kept/lata/head.json").exists()


def test_vectors_of_classifiers_become_one_vector_that_is_merged_onto_the_encoder(folder, lata, tmp_path):
    vectors = [f"plain-{task}/lata/task_vector" for task in TASKS]
    status, _, said = lata("regress", "plain", *vectors, "--output", str(tmp_path / "one"))
    assert status == 0, said
    assert not any("classifier" in name for name in TaskVector.open(tmp_path / "one"))
    status, _, said = lata("merge", "plain", str(tmp_path / "one"), "--weighting", "none", "--output", str(tmp_path / "merged"))
    assert status == 0, said
