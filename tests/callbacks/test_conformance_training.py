import lightning.pytorch as pl
import pytest
import torch
from conformance import Recorded, check, check_vector, expected_vector, fit, history, instruct, steps, values
from lightning.pytorch.callbacks import BaseFinetuning
from lightning_models import EXPECTED_WARNINGS, batches, tiny_llama, trainer

from lata_lightning import LATACallback

pytestmark = EXPECTED_WARNINGS

HELD = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}


@pytest.fixture
def _deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", HELD)
def test_the_vector_is_live_minus_start_in_the_precision_the_trainer_holds(tmp_path, models, precision):
    class Plain(Recorded):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)  # AdamW diverges in float16

    run = fit(tmp_path, models, module=Plain(instruct(models)), precision=precision, lata={"every_n_train_steps": 4})
    assert {tensor.dtype for tensor in values(run.module.model).values()} == {HELD[precision]}
    check(run, models, [4, 6, 8, 12], HELD[precision])


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"accumulate_grad_batches": 2}, [3, 6]),
        ({"accumulate_grad_batches": 4}, [2, 4]),
        ({"gradient_clip_val": 0.01}, [6, 12]),
        ({"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}, [6, 12]),
        ({"max_epochs": -1, "max_steps": 8}, [6, 8]),
        ({"max_steps": 1}, [1]),
        ({"limit_train_batches": 4}, [4, 8]),
        ({"limit_train_batches": 0.5}, [3, 6]),
        ({"overfit_batches": 2}, [2, 4]),
        ({"barebones": True}, [6, 12]),
        ({"deterministic": True}, [6, 12]),
        ({"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}, [6, 12]),
        ({"inference_mode": False, "num_sanity_val_steps": 0}, [6, 12]),
        ({"min_epochs": 3, "max_epochs": 3}, [6, 12, 18]),
    ],
    ids=str,
)
def test_every_trainer_option_leaves_the_measurement_true(tmp_path, models, options, expected):
    check(fit(tmp_path, models, **options), models, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"val_check_interval": 0.5},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_validation_in_between_leaves_the_measurement_true(tmp_path, models, options):
    run = fit(tmp_path, models, val_data=batches(3), lata={"every_n_train_steps": 4}, **options)
    check(run, models, [4, 6, 8, 12])


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 4, 6, 8]), (3, [4, 6, 8]), (5, [6, 8]), (100, [8])])
def test_with_two_optimizers_every_crossing_of_n_steps_is_measured_once(tmp_path, models, every, expected):
    class TwoOptimizers(Recorded):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            parameters = list(self.parameters())
            return [torch.optim.SGD(parameters[:3], lr=0.1), torch.optim.SGD(parameters[3:], lr=0.1)]

    module = TwoOptimizers(instruct(models))
    run = fit(tmp_path, models, module=module, data=batches(4), max_epochs=1, lata={"every_n_train_steps": every})
    check(run, models, expected)


def test_steps_are_counted_in_optimizer_steps_under_accumulation(tmp_path, models):
    run = fit(tmp_path, models, accumulate_grad_batches=2, lata={"every_n_train_steps": 2, "every_n_epochs": 0})
    check(run, models, [2, 4, 6])


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 3}], ids=str)
def test_fast_dev_run_measures_and_leaves_no_file(tmp_path, models, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(tmp_path / "root", models, val_data=batches(1), lata={"output_dir": None}, **options)
    assert run.callback.alignment.layers["model.layers.0"].task_norm > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], ids=str)
def test_a_fit_of_no_steps_leaves_nothing_that_looks_like_a_result(tmp_path, models, options):
    fit(tmp_path, models, **options)
    assert not (tmp_path / "lata/task_vector").exists()
    assert not (tmp_path / "lata/history.jsonl").exists()


def test_an_interrupted_fit_leaves_no_vector(tmp_path, models):
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 8:
                raise RuntimeError("the power went off")

    with pytest.raises(RuntimeError, match="the power went off"):
        fit(tmp_path, models, after=[Interrupt()])
    assert steps(tmp_path / "lata") == [6]
    assert not (tmp_path / "lata/task_vector").exists()


def test_a_fit_stopped_from_the_keyboard_leaves_no_vector(tmp_path, models):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 8:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, models, after=[Stop()])
    assert steps(tmp_path / "lata") == [6]
    assert not (tmp_path / "lata/task_vector").exists()


def test_a_fit_that_stops_itself_is_exported_at_the_step_it_reached(tmp_path, models):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 8

    run = fit(tmp_path, models, after=[Stop()], max_epochs=5)
    check(run, models, [6, 8])


@pytest.mark.parametrize("compiled", ["block", "attention", "model", "in configure_model", "lightning module"])
def test_compiled_modules_are_measured_under_their_plain_names(tmp_path, models, compiled):
    model = instruct(models)
    if compiled == "block":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    elif compiled == "attention":
        model.model.layers[0].self_attn = torch.compile(model.model.layers[0].self_attn, backend="eager")
    module = Recorded(torch.compile(model, backend="eager") if compiled == "model" else model)
    if compiled == "in configure_model":
        module.configure_model = lambda: setattr(module.model.model, "norm", torch.compile(module.model.model.norm, backend="eager"))
    if compiled == "lightning module":
        callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
        trainer(tmp_path, callback, max_epochs=1).fit(torch.compile(module, backend="eager"), batches(1))
        assert callback.alignment.layers["model.layers.0"].task_norm > 0
        check_vector(tmp_path / "lata", expected_vector(values(model), values(instruct(models))))
    else:
        check(fit(tmp_path, models, module=module), models, [6, 12])


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_start_weights_read_from_disk_give_the_same_result(tmp_path, models, precision):
    run = fit(tmp_path, models, precision=precision, lata={"base_weights": str(models / "instruct")})
    check(run, models, [6, 12], HELD[precision])


def test_tied_weights_are_stored_once_and_right(tmp_path):
    module = Recorded(tiny_llama(tie_word_embeddings=True))
    start = values(module.model)
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(module, batches())
    assert "lm_head.weight" not in start
    check_vector(tmp_path / "lata", expected_vector(values(module.model), start))


class Thaw(BaseFinetuning):
    """Trains the head alone, from epoch 1 the last block too, from epoch 2 everything."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.model)

    def finetune_function(self, pl_module, epoch, optimizer):
        parts = {1: pl_module.model.model.layers[2], 2: pl_module.model.model}
        if epoch in parts:
            self.unfreeze_and_add_param_group(parts[epoch], optimizer, lr=0.05)


@pytest.mark.parametrize("place", ["before", "after"])
def test_gradual_unfreezing_is_measured_from_the_first_weights(tmp_path, models, place):
    run = fit(tmp_path, models, max_epochs=3, data=batches(2), **{place: [Thaw()]})
    check(run, models, [2, 4, 6])
    layers = history(tmp_path / "lata")[0]["layers"]
    assert [figures["task_norm"] for figures in layers.values()] == [0.0, 0.0, 0.0]
    assert history(tmp_path / "lata")[1]["layers"]["model.layers.2"]["task_norm"] > 0


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_weights_that_the_module_loads_late_are_the_start(tmp_path, models, hook):
    def load(self):
        if self.global_step == 0:
            self.model.load_state_dict(instruct(models).state_dict())

    module = type("Late", (Recorded,), {hook: load})(tiny_llama(seed=5))
    with pytest.warns(UserWarning, match="weights were loaded after the fit had started"):
        run = fit(tmp_path, models, module=module)
    check(run, models, [6, 12])


@pytest.mark.parametrize("doing", ["validate", "test", "predict"])
def test_without_a_fit_nothing_is_read_or_written(tmp_path, doing):
    class All(Recorded):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    callback = LATACallback("no/such/vector", output_dir=tmp_path / "lata")
    getattr(trainer(tmp_path, callback), doing)(All(tiny_llama()), batches(1))
    assert not (tmp_path / "lata").exists()
    assert callback.alignment is None
