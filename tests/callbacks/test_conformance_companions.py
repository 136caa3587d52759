"""LATACallback beside the other callbacks and tools of Lightning."""

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conformance import Recorded, check, check_history, check_vector, expected_vector, fit, history, instruct, steps, values
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning_models import EXPECTED_WARNINGS, batches, tiny_llama, trainer

from lata_lightning import LATACallback

pytestmark = EXPECTED_WARNINGS


class Sized(Recorded):
    """Has the attributes that the searches change, and its own data."""

    batch_size = 2

    def train_dataloader(self):
        return batches(12, self.batch_size)

    def val_dataloader(self):
        return batches(1)


def fit_sized(directory, models, search=None, before=(), after=()):
    callback = LATACallback(models / "instruction", output_dir=directory / "lata", every_n_train_steps=4, table=False)
    run = trainer(directory, *before, callback, *after, limit_train_batches=6)
    module = Sized(instruct(models))
    if search is not None:
        search(Tuner(run), module)
        assert not (directory / "lata").exists()
    run.fit(module)
    return run, module, callback


def check_sized(directory, models, module, callback):
    start = values(instruct(models))
    assert steps(directory / "lata") == [4, 6, 8, 12]
    check_history(directory / "lata", module.states, start, models)
    check_vector(directory / "lata", expected_vector(values(module.model), start))
    assert sorted(path.name for path in directory.iterdir()) == ["lata"]
    assert callback.state_dict()["last_step"] == 12


@pytest.mark.parametrize(
    "search",
    [
        lambda tuner, module: tuner.lr_find(module, num_training=8, attr_name="learning_rate"),
        lambda tuner, module: tuner.scale_batch_size(module, steps_per_trial=2, max_trials=2),
        lambda tuner, module: (
            tuner.scale_batch_size(module, max_trials=2),
            tuner.lr_find(module, num_training=8, attr_name="learning_rate"),
        ),
    ],
    ids=["lr_find", "scale_batch_size", "both"],
)
def test_a_search_by_the_tuner_leaves_no_trace_in_the_measurement(tmp_path, models, search):
    _, module, callback = fit_sized(tmp_path, models, search)
    check_sized(tmp_path, models, module, callback)


def test_a_search_between_epochs_leaves_no_trace_in_the_measurement(tmp_path, models):
    class BetweenEpochs(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.global_step in (0, 6):
                self.lr_find(trainer, pl_module)

    search = BetweenEpochs(num_training_steps=8, attr_name="learning_rate")
    _, module, callback = fit_sized(tmp_path, models, after=[search])
    check_sized(tmp_path, models, module, callback)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: WeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["EMA", "average", "SWA"],
)
def test_epoch_ends_measure_the_raw_weights_under_averaging(tmp_path, models, averaging, place):
    run = fit(tmp_path, models, max_epochs=3, val_data=batches(2), lata={"every_n_train_steps": 4}, **{place: [averaging()]})
    assert steps(run.directory) == [4, 6, 8, 12, 16, 18]
    check_history(run.directory, run.module.states, values(instruct(models)), models)


def test_callbacks_of_different_names_measure_and_export_side_by_side(tmp_path, models):
    other = LATACallback(models / "instruction", name="other", level="tensor", every_n_epochs=2, output_dir=tmp_path / "other", table=False)
    run = fit(tmp_path, models, after=[other])
    check(run, models, [6, 12])
    assert steps(tmp_path / "other") == [12]
    check_vector(tmp_path / "other", expected_vector(values(run.module.model), values(instruct(models))))
    assert {"lata/alignment", "other/alignment"} <= set(run.trainer.callback_metrics)


def test_callbacks_of_one_name_are_refused_by_the_trainer(tmp_path, models):
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "one"), LATACallback(output_dir=tmp_path / "two"))


def test_each_of_two_fits_of_new_trainers_has_its_own_start(tmp_path, models):
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "first", table=False)
    trainer(tmp_path, callback).fit(Recorded(instruct(models)), batches())
    callback.output_dir = tmp_path / "second"
    module = Recorded(tiny_llama(seed=8))
    start = values(module.model)
    trainer(tmp_path, callback).fit(module, batches(3))
    assert steps(tmp_path / "second") == [3, 6]
    check_history(tmp_path / "second", module.states, start, models)
    check_vector(tmp_path / "second", expected_vector(values(module.model), start))


def test_another_fit_of_one_trainer_goes_on_with_history_and_start(tmp_path, models):
    run = fit(tmp_path, models, max_epochs=1, val_data=batches(1), lata={"every_n_train_steps": 4})
    run.trainer.validate(run.module, batches(1), verbose=False)
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(run.module, batches(), batches(1))
    check(run, models, [4, 6, 8, 12])


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_checkpoint_on_exception_can_be_written_before_the_start_is_known(tmp_path, models, place):
    class Fail(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("no more room")

    with pytest.raises(RuntimeError, match="no more room"):
        fit(tmp_path, models, enable_checkpointing=True, **{place: [Fail(), OnExceptionCheckpoint(tmp_path)]})
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["callbacks"]
    assert [value["fingerprint"] for key, value in state.items() if "LATACallback" in key] == [None]


def test_monitors_see_the_figures_of_the_moment(tmp_path, models):
    class Watch(pl.Callback):
        seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append((trainer.global_step, trainer.callback_metrics["lata/alignment"].item()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in (4, 8):
                self.seen.append((trainer.global_step, trainer.callback_metrics["lata/alignment"].item()))

    kept = ModelCheckpoint(tmp_path / "kept", monitor="lata/alignment_min", mode="max", filename="{step}", save_top_k=-1)
    run = fit(tmp_path, models, after=[watch := Watch(), kept], lata={"every_n_train_steps": 4}, enable_checkpointing=True)
    check(run, models, [4, 6, 8, 12])
    assert watch.seen == [(row["step"], pytest.approx(row["alignment"], rel=1e-6)) for row in history(run.directory)]
    scores = {int(Path(path).stem.split("=")[1]): score.item() for path, score in kept.best_k_models.items()}
    assert scores == {
        row["step"]: pytest.approx(row["alignment_min"], rel=1e-6) for row in history(run.directory) if row["step"] in (6, 12)
    }


def test_a_callback_can_be_copied_before_and_pickled_for_spawned_processes(tmp_path, models):
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    sent = pickle.loads(pickle.dumps(copy.deepcopy(callback)))  # noqa: S301
    trainer(tmp_path, sent).fit(Recorded(instruct(models)), batches())
    assert steps(tmp_path / "lata") == [6, 12]


def test_a_checkpoint_of_an_epoch_without_measurement_takes_the_figure_of_the_last_one(tmp_path, models):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="lata/alignment_min", mode="max", filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, models, after=[kept], enable_checkpointing=True, max_epochs=4, data=batches(2), lata={"every_n_epochs": 2})
    check(run, models, [4, 8])
    measured = [row["alignment_min"] for row in history(run.directory)]
    scores = {Path(path).stem: score.item() for path, score in kept.best_k_models.items()}
    # Lightning keeps a logged value until it is logged again; before the first measurement it warns, and saves nothing.
    assert scores == pytest.approx({"epoch=1": measured[0], "epoch=2": measured[0], "epoch=3": measured[1]}, rel=1e-6)
    assert kept.best_model_path.endswith("epoch=1.ckpt")


def test_early_stopping_needs_patience_for_the_epochs_without_measurement(tmp_path, models):
    options = {"mode": "max", "check_on_train_epoch_end": True}
    with pytest.raises(RuntimeError, match="lata/alignment"):
        fit(tmp_path / "strict", models, after=[EarlyStopping("lata/alignment", **options)], data=batches(2), lata={"every_n_epochs": 2})
    stopping = EarlyStopping("lata/alignment", patience=1, strict=False, **options)
    run = fit(tmp_path, models, after=[stopping], max_epochs=9, data=batches(2), lata={"every_n_epochs": 2})
    # The figure of epoch 1 is seen again in epoch 2, where it is no improvement.
    assert run.trainer.current_epoch == 3
    check(run, models, [4, 6])


def test_an_averaged_fit_of_no_steps_leaves_no_artefact(tmp_path, models):
    run = fit(tmp_path, models, after=[EMAWeightAveraging(decay=0.9)], max_epochs=0)
    assert not (run.directory / "task_vector").exists()
    assert not (run.directory / "history.jsonl").exists()
