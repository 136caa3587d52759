"""A run that was interrupted and resumed leaves what the uninterrupted run leaves, bit for bit."""

import lightning.pytorch as pl
import pytest
import torch
from conformance import (
    Recorded,
    check,
    check_history,
    check_same,
    check_vector,
    expected_vector,
    fit,
    history,
    instruct,
    same_batches,
    steps,
    values,
)
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning_models import EXPECTED_WARNINGS, tiny_llama, trainer
from tiny_models import read_back

from lata_lightning import LATACallback, LataError

pytestmark = EXPECTED_WARNINGS

EVERY_FOUR = {"every_n_train_steps": 4}


class Fail(pl.Callback):
    """Raises in a hook at a step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("the power went off")


def run(directory, models, *, keep=None, fail=None, **options):
    """A fit that keeps checkpoints in ``directory`` and may fail on the way."""
    after = [*([fail] if fail else []), *([ModelCheckpoint(directory, **keep)] if keep else []), *options.pop("after", [])]
    options = {"data": same_batches(), "enable_checkpointing": True, "lata": EVERY_FOUR, "max_epochs": 3, **options}
    if fail is None:
        return fit(directory, models, after=after, **options)
    with pytest.raises(RuntimeError, match="the power went off"):
        fit(directory, models, after=after, **options)
    return None


KEPT = {
    "epoch end": ({"filename": "kept"}, 6, Fail("on_train_batch_start", 9)),
    "middle of an epoch": ({"filename": "kept", "every_n_train_steps": 3, "save_top_k": 1}, 9, Fail("on_train_batch_start", 11)),
    "step of a measurement": ({"filename": "kept", "every_n_train_steps": 4}, 8, Fail("on_train_batch_start", 11)),
    "last batch of an epoch": ({"filename": "kept", "every_n_train_steps": 6}, 6, Fail("on_train_batch_start", 9)),
    "last.ckpt": ({"filename": "other", "save_last": True}, 6, Fail("on_train_batch_start", 9)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_resumed_run_leaves_what_the_uninterrupted_one_leaves(tmp_path, models, kind):
    keep, step, fail = KEPT[kind]
    run(tmp_path / "parts", models, keep=keep, fail=fail)
    checkpoint = tmp_path / "parts" / ("last.ckpt" if kind == "last.ckpt" else "kept.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    run(tmp_path / "whole", models, keep=keep)
    run(tmp_path / "parts", models, keep=keep, resume=checkpoint)
    assert steps(tmp_path / "whole/lata") == [4, 6, 8, 12, 16, 18]
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 6),
        ("on_train_batch_start", 9),
        ("on_train_batch_end", 8),
        ("on_before_zero_grad", 8),
        ("on_train_epoch_end", 12),
    ],
)
def test_a_checkpoint_on_exception_resumes_to_the_same_end(tmp_path, models, hook, step):
    parts = [OnExceptionCheckpoint(tmp_path / "parts")]
    run(tmp_path / "parts", models, fail=Fail(hook, step), after=parts)
    run(tmp_path / "parts", models, resume=tmp_path / "parts/on_exception.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_checkpoint_on_exception_is_taken_up_without_a_path(tmp_path, models):
    run(tmp_path / "parts", models, fail=Fail("on_train_batch_start", 9), after=[OnExceptionCheckpoint(tmp_path / "parts")])
    run(tmp_path / "parts", models, after=[OnExceptionCheckpoint(tmp_path / "parts")])
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")
    assert not (tmp_path / "parts/on_exception.ckpt").exists()


@pytest.mark.parametrize("options", [{"precision": "bf16-true"}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_resuming_is_exact_under_other_options_too(tmp_path, models, options):
    run(
        tmp_path / "parts",
        models,
        keep={"filename": "kept"},
        fail=Fail("on_train_epoch_start", 3 if "accumulate_grad_batches" in options else 6),
        **options,
    )
    run(tmp_path / "parts", models, resume=tmp_path / "parts/kept.ckpt", **options)
    run(tmp_path / "whole", models, **options)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_resuming_in_double_precision_is_measured_from_the_original_start(tmp_path, models):
    run(tmp_path, models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9), precision="64-true")
    resumed = run(tmp_path, models, resume=tmp_path / "kept.ckpt", precision="64-true")
    # Lightning restores weights before it widens the module, so that the run goes on from rounded weights; the measurement is theirs.
    start = {name: tensor.double() for name, tensor in values(instruct(models)).items()}
    check_vector(tmp_path / "lata", expected_vector(values(resumed.module.model), start, torch.float64))
    assert steps(tmp_path / "lata") == [4, 6, 8, 12, 16, 18]


def test_a_run_may_be_resumed_many_times(tmp_path, models):
    resume = None
    for step in (5, 9, 10, 15):
        run(
            tmp_path / "parts",
            models,
            keep={"filename": "kept", "every_n_train_steps": 1},
            fail=Fail("on_train_batch_start", step),
            resume=resume,
        )
        resume = tmp_path / "parts/kept.ckpt"
    run(tmp_path / "parts", models, resume=resume)
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_finished_run_may_be_extended(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, max_epochs=2)
    assert (tmp_path / "parts/lata/task_vector").is_dir()
    run(tmp_path / "parts", models, resume=tmp_path / "parts/kept.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_history_line_that_was_cut_off_is_measured_again(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9))
    path = tmp_path / "parts/lata/history.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    run(tmp_path / "parts", models, resume=tmp_path / "parts/kept.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_resumed_run_may_write_to_a_new_directory(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9))
    run(tmp_path / "new", models, resume=tmp_path / "parts/kept.ckpt")
    whole = run(tmp_path / "whole", models)
    assert history(tmp_path / "new/lata") == [row for row in history(whole.directory) if row["step"] > 6]


@pytest.mark.parametrize("place", ["before", "after"])
def test_resuming_under_averaged_weights_goes_on_from_the_raw_ones(tmp_path, models, place):
    def part(directory, fail=None, resume=None):
        callbacks = {"before": [], "after": [*([fail] if fail else []), ModelCheckpoint(directory, filename="kept")]}
        callbacks[place].insert(0, EMAWeightAveraging(decay=0.5))
        module = Recorded(instruct(models))
        fit(directory, models, module=module, data=same_batches(), resume=resume, enable_checkpointing=True, max_epochs=3, **callbacks)
        return module

    part(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power went off"):
        part(tmp_path / "parts", fail=Fail("on_train_batch_start", 9))
    module = part(tmp_path / "parts", resume=tmp_path / "parts/kept.ckpt")
    assert (tmp_path / "parts/lata/history.jsonl").read_text() == (tmp_path / "whole/lata/history.jsonl").read_text()
    assert max(module.states) == 18


def test_the_same_trainer_may_go_back_to_an_earlier_checkpoint(tmp_path, models):
    whole = run(tmp_path / "parts", models, keep={"filename": "{epoch}", "save_top_k": -1}, max_epochs=2)
    whole.trainer.fit_loop.max_epochs = 3
    whole.trainer.fit(whole.module, same_batches(), ckpt_path=tmp_path / "parts/epoch=0.ckpt")
    run(tmp_path / "whole", models)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


# --- checkpoints that cannot be resumed from -----------------------------------------------------------------------------------------------


def test_a_weights_only_file_is_refused_with_what_to_pass(tmp_path, models):
    run(tmp_path, models, keep={"filename": "kept", "save_weights_only": True}, max_epochs=1)
    module = Recorded(instruct(models))
    with pytest.raises(LataError, match=r"without state of the callback.*base_weights="):
        run(tmp_path / "resumed", models, module=module, resume=tmp_path / "kept.ckpt")
    assert module.losses == []
    # Lightning itself cannot fit from such a file, whatever the start weights are.
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        run(tmp_path / "resumed", models, resume=tmp_path / "kept.ckpt", lata={"base_weights": str(models / "instruct")})
    assert not (tmp_path / "resumed/lata").exists()


def test_the_refusal_of_another_model_is_that_of_lightning(tmp_path, models):
    run(tmp_path / "first", models, keep={"filename": "kept"}, max_epochs=1)
    for other in (tiny_llama(num_hidden_layers=2), tiny_llama(hidden_size=24, intermediate_size=32)):
        with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
            trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(
                Recorded(other), same_batches(), ckpt_path=tmp_path / "first/kept.ckpt"
            )
    assert not (tmp_path / "lata").exists()


class Built(Recorded):
    """Builds its model only when the fit is under way."""

    def __init__(self, models):
        super().__init__(None)
        self.models = models

    def configure_model(self):
        if self.model is None:
            self.model = instruct(self.models)


def test_resuming_a_model_of_configure_model_is_refused_and_base_weights_mends_it(tmp_path, models):
    keep = {"filename": "kept"}
    run(tmp_path / "parts", models, keep=keep, module=Built(models), fail=Fail("on_train_batch_start", 9))
    resume = tmp_path / "parts/kept.ckpt"
    with pytest.raises(LataError, match="base_weights="):
        run(tmp_path / "refused", models, module=Built(models), resume=resume)
    run(tmp_path / "parts", models, module=Built(models), resume=resume, lata={**EVERY_FOUR, "base_weights": str(models / "instruct")})
    run(tmp_path / "whole", models, module=Built(models))
    assert history(tmp_path / "parts/lata") == history(tmp_path / "whole/lata")
    check_history(tmp_path / "parts/lata", run(tmp_path / "again", models).module.states, values(instruct(models)), models)


# --- state ---------------------------------------------------------------------------------------------------------------------------------


def test_state_of_a_later_release_is_refused_and_unknown_or_missing_keys_are_not(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9))
    run(tmp_path / "whole", models)
    content = torch.load(tmp_path / "parts/kept.ckpt", weights_only=True)
    key = LATACallback().state_key
    content["callbacks"][key]["from the future"] = {"a": [1, 2.0, None, torch.zeros(2)]}
    torch.save(content, tmp_path / "more.ckpt")
    run(tmp_path / "parts", models, resume=tmp_path / "more.ckpt")
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")
    older = {"fingerprint": content["callbacks"][key]["fingerprint"]}
    torch.save({**content, "callbacks": {key: older}}, tmp_path / "older.ckpt")
    resumed = run(tmp_path / "older", models, resume=tmp_path / "older.ckpt")
    check_vector(resumed.directory, read_back(tmp_path / "whole/lata/task_vector"))
    content["callbacks"][key]["version"] += 1
    torch.save(content, tmp_path / "newer.ckpt")
    with pytest.raises(LataError, match="Upgrade"):
        run(tmp_path / "newer", models, resume=tmp_path / "newer.ckpt")


def test_a_checkpoint_without_the_state_is_refused_and_base_weights_mends_it(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 9))
    run(tmp_path / "whole", models)
    content = torch.load(tmp_path / "parts/kept.ckpt", weights_only=True)
    del content["callbacks"][LATACallback().state_key]
    torch.save(content, tmp_path / "without.ckpt")
    with pytest.raises(LataError, match=r"without state of the callback.*base_weights="):
        run(tmp_path / "refused", models, resume=tmp_path / "without.ckpt")
    resumed = run(tmp_path / "parts", models, resume=tmp_path / "without.ckpt", lata={"base_weights": str(models / "instruct")})
    check_vector(resumed.directory, read_back(tmp_path / "whole/lata/task_vector"))


def test_the_state_does_not_grow_with_the_width_of_the_model(tmp_path):
    sizes = []
    for width in (16, 64):
        name = str(width)
        checkpoint = ModelCheckpoint(tmp_path, filename=name)
        callback = LATACallback(output_dir=tmp_path / f"lata{name}")
        module = Recorded(tiny_llama(hidden_size=width, intermediate_size=2 * width))
        trainer(tmp_path, callback, checkpoint, max_epochs=1, enable_checkpointing=True).fit(module, same_batches(1))
        torch.save(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"][callback.state_key], tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 200
    assert sizes[1] < 200 * 30 + 2000


# --- tensors that are unfrozen on the way --------------------------------------------------------------------------------------------------


class Thaw(BaseFinetuning):
    """Trains the head alone, and from epoch 1 on the last block too."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.model)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.model.layers[2], optimizer, lr=0.05)


def test_a_run_resumed_before_a_tensor_is_unfrozen_is_exact(tmp_path, models):
    run(tmp_path / "parts", models, keep={"filename": "kept"}, fail=Fail("on_train_batch_start", 8), before=[Thaw()])
    run(tmp_path / "parts", models, before=[Thaw()], resume=tmp_path / "parts/kept.ckpt")
    whole = run(tmp_path / "whole", models, before=[Thaw()])
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")
    check(whole, models, [4, 6, 8, 12, 16, 18])
