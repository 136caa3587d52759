import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from passed_warnings import CHECKPOINTS_EXIST, FEW_BATCHES, FEW_WORKERS, LEAF_SPEC, NO_VALIDATION_LOADER
from tiny_models import llama, read_back, same_bits

from lata_lightning.callbacks.lata import LATACallback
from lata_lightning.errors import CorruptFileError, LataError, OutputError
from lata_lightning.merging.merge import Term, merge
from lata_lightning.training.continual import Task, learn_in_sequence
from lata_lightning.training.module import CausalLMModule
from lata_lightning.vectors.task_vector import TaskVector

pytestmark = [FEW_WORKERS, LEAF_SPEC, FEW_BATCHES, NO_VALIDATION_LOADER, CHECKPOINTS_EXIST]
OPTIONS = {
    "accelerator": "cpu", "devices": 1, "max_epochs": 2, "limit_val_batches": 0,
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Rows(pl.LightningDataModule):
    """Four rows whose tokens depend on the task."""

    def __init__(self, seed):
        super().__init__()
        self.tokens = torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(seed))

    def train_dataloader(self):
        rows = [{"input_ids": row, "labels": row} for row in self.tokens]
        return torch.utils.data.DataLoader(rows, batch_size=2)


def loss_on(rows):
    def score(model):
        with torch.no_grad():
            return -model(input_ids=rows.tokens, labels=rows.tokens).loss.item()

    return score


class Fits:
    """Tasks, and how often each was trained from which model."""

    def __init__(self, **options):
        self.origins, self.seeds, self.options = [], [], {**OPTIONS, **options}

    def task(self, name, seed):
        rows = Rows(seed)

        def prepare(origin):
            self.origins.append((name, origin.name))
            self.seeds.append(torch.initial_seed())
            return CausalLMModule(str(origin), learning_rate=1e-2), rows, self.options

        return Task(name, prepare, loss_on(rows), seed)

    def tasks(self, *names):
        return [self.task(name, seed) for seed, name in enumerate(names or ("first", "second"), start=1)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "start"
    llama().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def instruction(start):
    return TaskVector.between(llama(1), start, kind="instruction")


def vector_of(output, stage):
    return TaskVector.open(output / stage / "run" / "task_vector")


def test_merging_adds_the_scaled_vectors_of_all_tasks_so_far_to_the_start(start, tmp_path):
    fits = Fits()
    learned = learn_in_sequence(start, fits.tasks(), tmp_path / "out", scale=0.5)
    assert fits.origins == [("first", "start"), ("second", "start")]
    assert fits.seeds == [1, 2]
    vectors = [vector_of(tmp_path / "out", stage) for stage in ("01-first", "02-second")]
    merge(start, [Term(vector, 0.5) for vector in vectors], tmp_path / "by-hand")
    assert same_bits(read_back(learned.model), read_back(tmp_path / "by-hand"))
    merge(start, [Term(vectors[0], 0.5)], tmp_path / "first-by-hand")
    assert same_bits(read_back(tmp_path / "out/01-first/model"), read_back(tmp_path / "first-by-hand"))
    assert vectors[0].manifest.coefficients is None


def test_a_method_makes_one_vector_of_all_tasks_so_far(start, tmp_path):
    learned = learn_in_sequence(start, Fits().tasks(), tmp_path / "out", method="regression")
    vectors = [vector_of(tmp_path / "out", stage) for stage in ("01-first", "02-second")]
    merge(start, [Term(vector) for vector in vectors], tmp_path / "by-hand", method="regression")
    assert same_bits(read_back(learned.model), read_back(tmp_path / "by-hand"))
    assert not same_bits(read_back(merge(start, [Term(vector) for vector in vectors], tmp_path / "summed")), read_back(learned.model))


def test_the_weighting_gives_the_vectors_their_coefficients(start, instruction, tmp_path):
    learned = learn_in_sequence(start, Fits().tasks("only"), tmp_path / "out", weighting="linear", instruction_vector=instruction)
    vector = vector_of(tmp_path / "out", "01-only")
    assert sorted(vector.manifest.coefficients.values()) == [0.5, 1.0]
    outside = "model.embed_tokens.weight"
    assert torch.equal(read_back(learned.model)[outside], read_back(start)[outside])
    assert vector[outside].abs().max() > 0


def test_sequential_fine_tuning_ends_where_two_plain_fits_end(start, tmp_path):
    fits = Fits()
    learned = learn_in_sequence(start, fits.tasks(), tmp_path / "out", rule="sequential")
    assert fits.origins == [("first", "start"), ("second", "model")]
    model = llama()
    for task in Fits().tasks():
        pl.seed_everything(task.seed, workers=True, verbose=False)
        module, data, options = task.prepare(start)
        module.model.load_state_dict(model.state_dict())
        pl.Trainer(**options, enable_checkpointing=False).fit(module, datamodule=data)
        model = module.model
    expected = dict(model.named_parameters())
    for name, tensor in read_back(learned.model).items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-5, atol=1e-6)


def test_the_matrix_has_the_score_of_every_task_after_every_stage(start, tmp_path):
    from transformers import AutoModelForCausalLM

    tasks = Fits().tasks()
    learned = learn_in_sequence(start, tasks, tmp_path / "out")
    models = [start, tmp_path / "out/01-first/model", tmp_path / "out/02-second/model"]
    matrix = [[task.score(AutoModelForCausalLM.from_pretrained(model)) for task in tasks] for model in models]
    assert [learned.reference, *learned.accuracies] == matrix
    assert learned.summary["forward_transfer"] == pytest.approx(matrix[1][1] - matrix[0][1])
    data = json.loads((tmp_path / "out/accuracies.json").read_text())
    assert [data["reference"], *data["accuracies"]] == matrix
    assert [stage["backward_transfer"] for stage in data["stages"]] == [None, learned.summary["backward_transfer"]]
    assert matrix[1][0] > matrix[0][0]


def test_a_finished_sequence_trains_and_scores_nothing_again(start, tmp_path):
    first = learn_in_sequence(start, Fits().tasks(), tmp_path / "out")
    fits = Fits()
    tasks = [Task(task.name, task.prepare, lambda _: pytest.fail("scored again"), task.seed) for task in fits.tasks()]
    assert learn_in_sequence(start, tasks, tmp_path / "out") == first
    assert fits.origins == []


def broken_off(monkeypatch, at):
    """Lets the fit of a task fail at the end of an epoch, by a callback hook."""
    real = LATACallback.on_train_epoch_end

    def failing(self, trainer, module):
        real(self, trainer, module)
        if at in str(self.output_dir) and trainer.current_epoch == 1:
            raise RuntimeError("power cut")

    monkeypatch.setattr(LATACallback, "on_train_epoch_end", failing)


@pytest.mark.parametrize("keep_checkpoints", [False, True])
@pytest.mark.parametrize("rule", ["merge", "sequential"])
def test_an_interrupted_sequence_equals_an_uninterrupted_one(start, tmp_path, keep_checkpoints, rule):
    whole = learn_in_sequence(start, Fits().tasks(), tmp_path / "whole", rule=rule)
    with pytest.MonkeyPatch.context() as patch:
        broken_off(patch, "second")
        with pytest.raises(RuntimeError, match="power cut"):
            learn_in_sequence(start, Fits().tasks(), tmp_path / "out", rule=rule, keep_checkpoints=keep_checkpoints)
    assert len(json.loads((tmp_path / "out/accuracies.json").read_text())["accuracies"]) == 1
    left = tmp_path / "out/.02-second.partial"
    assert left.exists()
    assert list(left.glob("latest/*.ckpt")) == ([left / "latest/latest.ckpt"] if keep_checkpoints else [])
    fits = Fits()
    learned = learn_in_sequence(start, fits.tasks(), tmp_path / "out", rule=rule, keep_checkpoints=keep_checkpoints)
    assert [name for name, _ in fits.origins] == ["second"]
    assert (learned.reference, learned.accuracies) == (whole.reference, whole.accuracies)
    assert same_bits(read_back(learned.model), read_back(whole.model))
    histories = [
        [json.loads(line)["step"] for line in (tmp_path / name / "02-second/run/history.jsonl").read_text().splitlines()]
        for name in ("out", "whole")
    ]
    assert histories[0] == histories[1] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["01-first", "02-second", "accuracies.json"]
    assert sorted(path.name for path in (tmp_path / "out/02-second").iterdir()) == ["model", "run"]


def test_a_task_that_was_trained_but_not_merged_is_not_trained_again(start, tmp_path, monkeypatch):
    from lata_lightning.training import continual

    with monkeypatch.context() as patch:
        patch.setattr(continual, "merge", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("disk full")))
        with pytest.raises(RuntimeError, match="disk full"):
            learn_in_sequence(start, Fits().tasks("only"), tmp_path / "out")
    fits = Fits()
    learned = learn_in_sequence(start, fits.tasks("only"), tmp_path / "out")
    assert fits.origins == []
    assert len(learned.accuracies) == 1


def test_a_stage_that_was_deleted_is_learned_and_scored_again(start, tmp_path):
    import shutil

    learn_in_sequence(start, Fits().tasks(), tmp_path / "out")
    record = tmp_path / "out/accuracies.json"
    data = json.loads(record.read_text())
    changed = {**data, "accuracies": [data["accuracies"][0], [7.0, 7.0]]}
    record.write_text(json.dumps(changed))
    shutil.rmtree(tmp_path / "out/02-second")
    fits = Fits()
    assert learn_in_sequence(start, fits.tasks(), tmp_path / "out").accuracies == data["accuracies"]
    assert [name for name, _ in fits.origins] == ["second"]
    shutil.rmtree(tmp_path / "out/01-first")
    with pytest.raises(OutputError, match=r"lacks 1: \['01-first'\] before later stages"):
        learn_in_sequence(start, Fits().tasks(), tmp_path / "out")


def test_another_sequence_in_the_directory_is_refused(start, tmp_path):
    learn_in_sequence(start, Fits().tasks("only"), tmp_path / "out")
    with pytest.raises(OutputError, match=r"holds another sequence; 2 of \d+ settings differ: \['scale: 1.0 there, 0.5 here', \"tasks: "):
        learn_in_sequence(start, Fits().tasks("other"), tmp_path / "out", scale=0.5)
    (tmp_path / "out/accuracies.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="holds no accuracy matrix"):
        learn_in_sequence(start, Fits().tasks("only"), tmp_path / "out")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/notes.txt").write_text("kept")
    with pytest.raises(OutputError, match="is not the output of a sequence"):
        learn_in_sequence(start, Fits().tasks("only"), tmp_path / "strange")


@pytest.mark.parametrize("names", [("same", "same"), ("../up",), ("a/b",), ("",), (".hidden",), ()])
def test_names_that_are_no_directories_of_their_own_are_refused(start, tmp_path, names):
    tasks = [Fits().task(name, 1) for name in names]
    with pytest.raises(LataError, match="tasks need different names"):
        learn_in_sequence(start, tasks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_settings_are_refused(start, tmp_path):
    tasks, output = Fits().tasks("only"), tmp_path / "out"
    with pytest.raises(LataError, match="unknown rule 'average'; choose one of sequential, merge"):
        learn_in_sequence(start, tasks, output, rule="average")
    with pytest.raises(LataError, match="nothing is weighted or scaled, got weighting 'none' and scale 0.5"):
        learn_in_sequence(start, tasks, output, rule="sequential", scale=0.5)
    with pytest.raises(LataError, match="the weighting 'log' needs an instruction vector"):
        learn_in_sequence(start, tasks, output, weighting="log")
    with pytest.raises(LataError, match="unknown method 'ties'; choose one of sum, regression, tsv, iso"):
        learn_in_sequence(start, tasks, output, method="ties")
    for options in ({"rule": "sequential"}, {"weighting": "log"}):
        with pytest.raises(LataError, match="needs the rule 'merge' and the weighting 'none'"):
            learn_in_sequence(start, tasks, output, method="tsv", **options)


def test_several_processes_and_scores_that_are_no_numbers_are_refused(start, tmp_path):
    with pytest.raises(LataError, match="the trainer of only has 2; set devices=1"):
        learn_in_sequence(start, Fits(devices=2).tasks("only"), tmp_path / "out")
    task = Fits().task("only", 1)
    with pytest.raises(LataError, match=r"they are not for 1: \['only'\]"):
        learn_in_sequence(start, [Task("only", task.prepare, lambda _: float("nan"))], tmp_path / "other")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r}); sys.path.insert(0, {training!r})
from test_continual_sequence import Fits, learn_in_sequence
from lata_lightning.callbacks.lata import LATACallback
real = LATACallback.on_train_batch_end
def killing(self, trainer, *rest):
    real(self, trainer, *rest)
    if "second" in str(self.output_dir) and trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
LATACallback.on_train_batch_end = killing
learn_in_sequence({start!r}, Fits().tasks(), {output!r}, keep_checkpoints=True)
"""


def test_a_killed_process_loses_at_most_an_epoch(start, tmp_path):
    here = Path(__file__).parent
    code = KILLED.format(tests=str(here.parent), training=str(here), start=str(start), output=str(tmp_path / "out"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "out/.02-second.partial/latest/latest.ckpt").is_file()
    whole = learn_in_sequence(start, Fits().tasks(), tmp_path / "whole")
    assert learn_in_sequence(start, Fits().tasks(), tmp_path / "out", keep_checkpoints=True).accuracies == whole.accuracies
