import csv

import lightning.pytorch as pl
import peft
import pytest
import torch
from conformance import (
    Recorded,
    check,
    check_same,
    check_vector,
    expected_vector,
    fit,
    history,
    instruct,
    killed_runs,
    no_leftovers,
    same_batches,
    steps,
    values,
)
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning_models import EXPECTED_WARNINGS, batches, tiny_llama, trainer
from test_conformance_companions import check_sized, fit_sized
from test_conformance_resume import EVERY_FOUR, Fail, Thaw, run
from tiny_models import read_back, same_bits

from lata_lightning import LATACallback, LataError, TaskVector, align

pytestmark = EXPECTED_WARNINGS

# --- searches ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "search",
    [
        lambda: LearningRateFinder(num_training_steps=8, attr_name="learning_rate"),
        lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2),
    ],
    ids=["learning rate", "batch size"],
)
def test_a_search_by_callback_leaves_no_trace_in_the_measurement(tmp_path, models, search):
    _, module, callback = fit_sized(tmp_path, models, after=[search()])
    check_sized(tmp_path, models, module, callback)


# --- weight averaging: alignment and vector of one artefact belong together ----------------------------------------------------------------


@pytest.mark.parametrize("every_n_epochs", [0, 1])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)],
    ids=["EMA", "SWA"],
)
def test_alignment_and_vector_of_an_averaged_run_are_those_of_the_weights_it_ends_with(tmp_path, models, averaging, place, every_n_epochs):
    run = fit(tmp_path, models, max_epochs=3, lata={"every_n_epochs": every_n_epochs}, **{place: [averaging()]})
    check_vector(run.directory, expected_vector(values(run.module.model), values(instruct(models))))
    exported = TaskVector.open(run.directory / "task_vector")
    measured = align(exported, TaskVector.open(models / "instruction"))
    assert exported.manifest.alignment.values == pytest.approx(measured.values, abs=1e-6)


# --- several callbacks, several fits -------------------------------------------------------------------------------------------------------


def test_two_callbacks_that_write_to_one_directory_are_refused(tmp_path, models):
    other = LATACallback(models / "instruction", name="other", output_dir=tmp_path / "lata", table=False)
    with pytest.raises(LataError, match="output_dir"):
        fit(tmp_path, models, after=[other])


def test_another_module_in_a_second_fit_is_measured_itself_or_refused(tmp_path, models):
    first = fit(tmp_path, models, max_epochs=1)
    module = Recorded(tiny_llama(seed=8))
    start = values(module.model)
    first.trainer.fit_loop.max_epochs = 2
    try:
        first.trainer.fit(module, batches())
    except LataError:
        return
    check_vector(first.directory, expected_vector(values(module.model), start))


def test_a_test_of_the_best_checkpoint_between_two_fits_changes_nothing(tmp_path, models):
    class Tested(Recorded):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    kept = ModelCheckpoint(tmp_path / "kept", monitor="lata/alignment_min", mode="max", save_top_k=1, every_n_train_steps=1)
    options = {"after": [kept], "enable_checkpointing": True, "max_epochs": 1, "lata": {"every_n_train_steps": 2, "every_n_epochs": 0}}
    run = fit(tmp_path, models, module=Tested(instruct(models)), data=batches(6), **options)
    assert steps(tmp_path / "lata") == [2, 4, 6]
    trained = values(run.module.model)
    run.trainer.test(run.module, batches(1), ckpt_path="best", verbose=False)
    run.module.model.load_state_dict(trained)
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(run.module, batches(6))
    check(run, models, [2, 4, 6, 8, 10, 12])


# --- what Lightning does not tell ----------------------------------------------------------------------------------------------------------


def test_frozen_tensors_that_are_changed_by_hand_are_left_out_with_a_warning(tmp_path, models):
    class Momentum(Recorded):
        """Sets its head by hand, as a teacher that follows its student does."""

        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                self.model.lm_head.weight.mul_(0.9)
            super().on_train_batch_end(outputs, batch, batch_idx)

    module = Momentum(instruct(models))
    module.model.lm_head.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"left out of the task vector.*lm_head.weight"):
        run = fit(tmp_path, models, module=module)
    live, start = (
        {name: tensor for name, tensor in values(model).items() if name != "lm_head.weight"} for model in (module.model, instruct(models))
    )
    check_vector(run.directory, expected_vector(live, start))


def test_the_line_of_the_end_of_training_names_the_epoch_of_its_step(tmp_path, models):
    fit(tmp_path, models, data=batches(2), max_epochs=3, lata={"every_n_epochs": 2})
    assert [(row["step"], row["epoch"]) for row in history(tmp_path / "lata")] == [(4, 1), (6, 2)]


# --- resume --------------------------------------------------------------------------------------------------------------------------------


class Unfreeze(pl.Callback):
    """Trains the head too, from step 7 on; unlike the hooks of an epoch, this one also takes effect in a run resumed in the middle."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= 7:
            pl_module.model.lm_head.requires_grad_(True)


def without_head(models):
    model = instruct(models)
    model.lm_head.requires_grad_(False)
    module = Recorded(model)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    return module


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_tensor_unfrozen_just_before_a_step_is_measured_from_its_start(tmp_path, models, place):
    check(fit(tmp_path, models, module=without_head(models), data=same_batches(), **{place: [Unfreeze()]}), models, [6, 12])


def resumed_or_mended(directory, models, part, resume):
    """A resumed run that is right by itself, or refused with what makes it right."""
    try:
        return part(directory, resume=resume)
    except LataError as error:
        if "base_weights=" not in str(error):
            raise
    return part(directory, resume=resume, lata={**EVERY_FOUR, "base_weights": str(models / "instruct")})


def test_a_run_resumed_after_a_tensor_was_unfrozen_is_exact(tmp_path, models):
    def part(directory, **options):
        return run(directory, models, module=without_head(models), before=[Unfreeze()], **options)

    part(tmp_path / "parts", keep={"filename": "kept", "every_n_train_steps": 8}, fail=Fail("on_train_batch_start", 10))
    resumed = resumed_or_mended(tmp_path / "parts", models, part, tmp_path / "parts/kept.ckpt")
    whole = part(tmp_path / "whole")
    check(whole, models, [4, 6, 8, 12, 16, 18])
    assert same_bits(values(resumed.module.model), values(whole.module.model))
    assert history(tmp_path / "parts/lata") == history(tmp_path / "whole/lata")
    check_vector(tmp_path / "parts/lata", expected_vector(values(whole.module.model), values(instruct(models))))


def test_a_run_resumed_after_base_finetuning_unfroze_a_tensor_keeps_its_difference(tmp_path, models):
    def part(directory, **options):
        return run(directory, models, before=[Thaw()], **options)

    part(tmp_path / "parts", keep={"filename": "kept", "every_n_train_steps": 14}, fail=Fail("on_train_batch_start", 16))
    resumed = resumed_or_mended(tmp_path / "parts", models, part, tmp_path / "parts/kept.ckpt")
    # Lightning does not unfreeze again here, so the weights differ from an uninterrupted run; the difference must still be that of the weights.
    check_vector(tmp_path / "parts/lata", expected_vector(values(resumed.module.model), values(instruct(models))))


def test_a_run_resumed_from_the_end_of_validation_has_no_line_twice(tmp_path, models):
    keep, val_data = {"filename": "kept", "save_on_train_epoch_end": False}, batches(1)
    run(tmp_path / "parts", models, keep=keep, val_data=val_data, fail=Fail("on_train_batch_start", 9))
    run(tmp_path / "parts", models, keep=keep, val_data=val_data, resume=tmp_path / "parts/kept.ckpt")
    run(tmp_path / "whole", models, keep=keep, val_data=val_data)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_an_epoch_end_between_validation_and_exception_is_measured_after_all(tmp_path, models):
    keep, val_data = {"filename": "kept", "save_on_train_epoch_end": False}, batches(1)
    with pytest.raises(RuntimeError, match="the power went off"):
        run(tmp_path / "parts", models, keep=keep, val_data=val_data, before=[Fail("on_train_epoch_end", 6)])
    run(tmp_path / "parts", models, keep=keep, val_data=val_data, resume=tmp_path / "parts/kept.ckpt")
    run(tmp_path / "whole", models, keep=keep, val_data=val_data)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_an_epoch_end_that_the_interrupted_run_did_not_reach_is_measured_after_all(tmp_path, models):
    run(tmp_path / "parts", models, fail=Fail("on_train_batch_end", 6), after=[OnExceptionCheckpoint(tmp_path / "parts")])
    run(tmp_path / "parts", models, resume=tmp_path / "parts/on_exception.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_checkpoint_without_the_state_is_resumed_without_a_measurement_out_of_turn(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9))
    content = torch.load(tmp_path / "parts/kept.ckpt", weights_only=True)
    del content["callbacks"][LATACallback().state_key]
    torch.save(content, tmp_path / "without.ckpt")
    run(tmp_path / "parts", models, resume=tmp_path / "without.ckpt", lata={**EVERY_FOUR, "base_weights": str(models / "instruct")})
    assert steps(tmp_path / "parts/lata") == [4, 6, 8, 12, 16, 18]


def test_a_checkpoint_written_before_the_measurement_of_its_step_is_resumed_exactly(tmp_path, models):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    run(tmp_path / "parts", models, before=[Save()], fail=Fail("on_train_batch_start", 10))
    run(tmp_path / "parts", models, resume=tmp_path / "early.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_export_is_exported_when_resumed(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, max_epochs=3, lata={**EVERY_FOUR, "export": ()})
    assert not (tmp_path / "parts/lata/task_vector").exists()
    run(tmp_path / "parts", models, resume=tmp_path / "parts/kept.ckpt")
    whole = run(tmp_path / "whole", models)
    assert history(tmp_path / "parts/lata") == history(whole.directory)
    check_vector(tmp_path / "parts/lata", read_back(whole.directory / "task_vector"))


# --- names ---------------------------------------------------------------------------------------------------------------------------------


def test_a_compiled_submodule_under_an_adapter_keeps_its_plain_name(tmp_path, models):
    model = peft.get_peft_model(instruct(models), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    layers = model.get_base_model().model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    run = fit(tmp_path, models, module=Recorded(model))
    assert run.callback.alignment.layers["model.layers.1"].task_norm > 0
    vector = TaskVector.open(run.directory / "task_vector")
    assert set(vector) - vector.unchanged == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(3)}


# --- files ---------------------------------------------------------------------------------------------------------------------------------


def test_an_output_directory_that_cannot_be_written_is_refused_before_training(tmp_path, models):
    (tmp_path / "lata").write_text("a file")
    module = Recorded(instruct(models))
    with pytest.raises(LataError, match="lata"):
        fit(tmp_path, models, module=module)
    assert module.losses == []


def test_a_fast_dev_run_after_a_fit_touches_no_file(tmp_path, models):
    first = fit(tmp_path, models)
    before = (tmp_path / "lata/history.jsonl").read_text()
    trainer(tmp_path, first.callback, fast_dev_run=True).fit(Recorded(instruct(models)), batches())
    assert (tmp_path / "lata/history.jsonl").read_text() == before


@pytest.mark.parametrize("every", [1, 50])
def test_a_logger_gets_the_figures_of_the_model_where_it_gets_those_of_the_layers(tmp_path, models, every):
    logger = CSVLogger(tmp_path, name="csv")
    fit(tmp_path, models, logger=logger, log_every_n_steps=every, lata={"every_n_train_steps": 4})
    rows = list(csv.DictReader((tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()))
    at = [[row["step"] for row in rows if row[key]] for key in ("lata/alignment", "lata_layers/alignment/model.layers.0")]
    # Lightning numbers the batch of the fourth step 3.
    assert at[0] == at[1] == ["3", "5", "7", "11"]


def test_every_killed_run_can_be_resumed_and_leaves_nothing_hidden(tmp_path_factory):
    root = killed_runs(tmp_path_factory)
    outcomes = {run: (run / "outcome").read_text().split() for run in root.glob("run-*")}
    assert {run.name for run, (_, status) in outcomes.items() if status != "0"} == set()
    resumed = [run / "lata" for run, (kind, _) in outcomes.items() if kind == "resumed"]
    for directory in resumed:
        check_same(directory, root / "whole/lata")
    assert [directory for directory in resumed if not no_leftovers(directory)] == []
