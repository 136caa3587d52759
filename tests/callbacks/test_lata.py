import csv
import json
import math
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_models import EXPECTED_WARNINGS, Module, batches, shifted, tiny_llama, trainer
from transformers import LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector, align
from lata_lightning.callbacks import lata as callback_module
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LayoutMismatchError, OutputError, WeightingError

pytestmark = EXPECTED_WARNINGS


@pytest.fixture
def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


def direct_alignment(base, instruct, tuned, prefix):
    """Alignment of all tensors under a prefix, from whole float64 vectors."""
    names = [name for name, _ in base.named_parameters() if name.startswith(prefix)]
    sides = [dict(model.named_parameters()) for model in (base, instruct, tuned)]
    flat = [torch.cat([side[name].detach().double().flatten() for name in names]) for side in sides]
    return torch.nn.functional.cosine_similarity(flat[2] - flat[0], flat[1] - flat[0], dim=0).item()


def history(directory):
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


# --- what it measures and writes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, models, options):
    runs = []
    for callbacks in ([], [LATACallback(models / "instruction", every_n_train_steps=1, output_dir=tmp_path / "lata", table=False)]):
        module = Module(LlamaForCausalLM.from_pretrained(models / "instruct"))
        torch.manual_seed(3)
        trainer(tmp_path, *callbacks, **options).fit(module, batches())
        runs.append(module)
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(one, other) for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True))


def test_alignment_equals_the_cosine_of_whole_float64_vectors(tmp_path, models, instruct):
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    module = Module(instruct)
    trainer(tmp_path, callback).fit(module, batches())
    base, start = (LlamaForCausalLM.from_pretrained(models / name) for name in ("base", "instruct"))
    for layer, value in callback.alignment.values.items():
        assert value == pytest.approx(direct_alignment(base, start, module.model, layer + "."), abs=1e-6)
    assert list(callback.alignment.values) == [f"model.layers.{index}" for index in range(3)]


def test_a_fine_tune_from_base_is_measured_against_base(tmp_path, models):
    base, start = (LlamaForCausalLM.from_pretrained(models / name) for name in ("base", "instruct"))
    module = Module(LlamaForCausalLM.from_pretrained(models / "base"))
    callback = LATACallback(models / "instruction", start="base", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(module, batches())
    for layer, value in callback.alignment.values.items():
        assert value == pytest.approx(direct_alignment(base, start, module.model, layer + "."), abs=1e-6)
    assert TaskVector.open(tmp_path / "lata" / "task_vector").start == "base"


def test_a_pair_of_models_serves_as_instruction_vector(tmp_path, models, instruct):
    pair = LATACallback((str(models / "base"), str(models / "instruct")), output_dir=tmp_path / "pair", table=False)
    saved = LATACallback(models / "instruction", output_dir=tmp_path / "saved", table=False, name="saved")
    trainer(tmp_path, pair, saved).fit(Module(instruct), batches())
    assert pair.alignment == saved.alignment


def test_the_exported_vector_is_the_difference_of_the_saved_models(tmp_path, models, instruct):
    module = Module(instruct)
    trainer(tmp_path, LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)).fit(module, batches())
    module.model.save_pretrained(tmp_path / "tuned")
    exported = TaskVector.open(tmp_path / "lata" / "task_vector")
    extracted = TaskVector.between(models / "instruct", tmp_path / "tuned").save(tmp_path / "extracted")
    assert set(exported) == set(extracted)
    assert all(torch.equal(exported[name], extracted[name]) for name in extracted)
    assert exported.manifest.start_identity.content_hash == extracted.manifest.start_identity.content_hash
    assert exported.manifest.tuned_identity.content_hash == extracted.manifest.tuned_identity.content_hash
    assert (exported.manifest.step, exported.manifest.epoch) == (12, 2)
    measured = align(exported, TaskVector.open(models / "instruction"))
    assert measured.values == pytest.approx(exported.manifest.alignment.values, rel=1e-12)


def test_history_has_a_line_per_epoch_and_per_n_steps(tmp_path, models, instruct):
    callback = LATACallback(models / "instruction", every_n_train_steps=4, output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(Module(instruct), batches(6))
    assert [(row["step"], row["epoch"]) for row in history(tmp_path / "lata")] == [(4, 0), (6, 0), (8, 1), (12, 1)]
    assert [measured.to_json() for measured in callback.history] == history(tmp_path / "lata")
    assert set(history(tmp_path / "lata")[0]["layers"]["model.layers.0"]) == {
        "alignment", "relative_norm", "task_norm", "instruction_norm", "coefficient",
    }  # fmt: skip


def test_every_second_epoch_and_the_end_are_measured(tmp_path, models, instruct):
    callback = LATACallback(models / "instruction", every_n_epochs=2, output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback, max_epochs=3).fit(Module(instruct), batches(2))
    assert [row["step"] for row in history(tmp_path / "lata")] == [4, 6]


def test_without_an_instruction_vector_norms_are_tracked_and_the_vector_has_no_coefficients(tmp_path, models, instruct):
    callback = LATACallback(output_dir=tmp_path / "lata")
    run = trainer(tmp_path, callback)
    run.fit(Module(instruct), batches())
    assert set(run.callback_metrics) == {"lata/task_norm"}
    vector = TaskVector.open(tmp_path / "lata" / "task_vector")
    assert vector.manifest.coefficients is None
    norm = math.sqrt(sum(tensor.double().square().sum().item() for tensor in vector.values()))
    assert run.callback_metrics["lata/task_norm"].item() == pytest.approx(norm, rel=1e-6)


def test_frozen_tensors_take_no_room_and_are_zero(tmp_path, models, instruct):
    instruct.model.embed_tokens.requires_grad_(False)
    instruct.model.layers[0].requires_grad_(False)
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(Module(instruct), batches())
    vector = TaskVector.open(tmp_path / "lata" / "task_vector")
    assert {name for name in vector if name.startswith(("model.layers.0.", "model.embed"))} == vector.unchanged
    assert not vector["model.embed_tokens.weight"].any()
    assert callback.alignment.values["model.layers.0"] == 1.0
    assert vector.manifest.tuned_identity.content_hash is not None


def test_what_is_unfrozen_later_is_measured_from_its_start_values(tmp_path, models, instruct):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.model.lm_head.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.model.lm_head.parameters())})

    instruct.lm_head.requires_grad_(False)
    module = Module(instruct)
    start = instruct.lm_head.weight.detach().clone()
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata"), Unfreeze()).fit(module, batches())
    exported = TaskVector.open(tmp_path / "lata" / "task_vector")["lm_head.weight"]
    assert exported.any()
    assert torch.equal(exported, module.model.lm_head.weight.detach() - start)


def test_tied_weights_are_measured_once(tmp_path):
    module = Module(tiny_llama(tie_word_embeddings=True))
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(module, batches())
    assert "lm_head.weight" not in TaskVector.open(tmp_path / "lata" / "task_vector")


def test_experts_are_measured_under_the_names_on_disk(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, vocab_size=32, num_local_experts=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=16)
    base = MixtralForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "instruct")
    module = Module(MixtralForCausalLM.from_pretrained(tmp_path / "instruct"))
    callback = LATACallback((str(tmp_path / "base"), str(tmp_path / "instruct")), output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(module, batches())
    module.model.save_pretrained(tmp_path / "tuned")
    exported, extracted = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(tmp_path / "instruct", tmp_path / "tuned")
    assert any("experts.1.w1" in name for name in exported)
    assert set(exported) == set(extracted)
    assert all(torch.equal(exported[name], extracted[name]) for name in extracted)


def test_bf16_true_starts_from_the_rounded_weights(tmp_path, models, instruct):
    module = Module(instruct, learning_rate=0.0)
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback, precision="bf16-true").fit(module, batches())
    assert callback.alignment.layers["model.layers.0"].task_norm == 0.0


def test_a_custom_module_is_measured_under_its_own_names(tmp_path):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))

        def training_step(self, batch, batch_idx):
            return self.body(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Plain(), data)
    vector = TaskVector.open(tmp_path / "lata" / "task_vector")
    assert "body.0.weight" in vector
    assert vector["body.1.running_mean"].any()
    assert vector.layers.blocks == ("body.0", "body.1", "body.2")


# --- logging -------------------------------------------------------------------------------------------------------------------------------


def test_checkpoint_and_early_stopping_can_monitor_what_is_logged(tmp_path, models, instruct):
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="lata/alignment_min", mode="max", filename="{epoch}", save_top_k=1)
    stopping = EarlyStopping("lata/alignment", mode="max", patience=1, check_on_train_epoch_end=True)
    run = trainer(tmp_path, callback, checkpoint, stopping, enable_checkpointing=True, max_epochs=9)
    run.fit(Module(instruct), batches())
    # The task vector grows, so alignment falls from the first epoch on.
    assert run.current_epoch == 2
    assert checkpoint.best_model_path.endswith("epoch=0.ckpt")


def test_every_logger_gets_the_figures_of_each_layer(tmp_path, models, instruct):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    callback = LATACallback(models / "instruction", table=False)
    trainer(tmp_path, callback, logger=loggers, log_every_n_steps=1).fit(Module(instruct), batches())
    rows = csv.DictReader((tmp_path / "csv/version_0/metrics.csv").read_text().splitlines())
    last = [row for row in rows if row["lata_layers/alignment/model.layers.2"]][-1]
    assert (last["step"], last["epoch"]) == ("11", "1.0")
    assert float(last["lata_layers/alignment/model.layers.2"]) == pytest.approx(callback.alignment.values["model.layers.2"], rel=1e-6)
    events = EventAccumulator(str(tmp_path / "board/version_0")).Reload()
    assert {"lata/alignment", "lata_layers/alignment/model.layers.0", "lata_layers/task_norm/model.layers.0"} <= set(
        events.Tags()["scalars"]
    )
    assert (tmp_path / "csv/version_0/lata/task_vector/task_vector.json").is_file()


def test_a_logger_with_tables_gets_a_table(tmp_path, models, instruct):
    class Tables(Logger):
        name, version, tables = "tables", 0, []

        def log_metrics(self, metrics, step=None): ...

        def log_hyperparams(self, *args, **kwargs): ...

        def log_table(self, key, columns, data, step):
            self.tables.append((key, columns, len(data), step))

    logger = Tables()
    trainer(tmp_path, LATACallback(models / "instruction", table=False, output_dir=tmp_path / "lata"), logger=logger).fit(
        Module(instruct), batches()
    )
    columns = ["layer", "alignment", "relative_norm", "task_norm"]
    assert logger.tables == [("lata/layers", columns, 3, 5), ("lata/layers", columns, 3, 11)]


def test_the_table_at_the_end_names_every_layer_and_says_that_it_is_too_flat(tmp_path, models, instruct, capsys):
    trainer(tmp_path, LATACallback(models / "instruction", output_dir=tmp_path / "lata")).fit(Module(instruct, 1e-4), batches())
    printed = capsys.readouterr().out
    assert "(blocks of model.layers)" in printed
    assert all(re.search(rf"^ {index} +\d", printed, re.MULTILINE) for index in range(3))
    # The lines below the table say so, once.
    assert "too little to rank the layers by" not in printed


def test_cosines_with_other_experts_can_be_monitored_and_are_those_of_whole_float64_vectors(tmp_path, models, instruct):
    experts = {name: shifted(LlamaForCausalLM.from_pretrained(models / "instruct"), seed) for name, seed in (("math", 2), ("code", 3))}
    for name, expert in experts.items():
        TaskVector.between(models / "instruct", expert).save(tmp_path / name)
    callback = LATACallback(compare_with={name: tmp_path / name for name in experts}, output_dir=tmp_path / "lata", table=False)
    # No cosine is above 0.9, so the first measurement stops the run.
    conflict = EarlyStopping("lata/cosine/math", mode="max", divergence_threshold=0.9, check_on_train_epoch_end=True)
    module = Module(instruct)
    run = trainer(tmp_path, callback, conflict, max_epochs=9)
    run.fit(module, batches())
    assert run.current_epoch == 1
    start = dict(LlamaForCausalLM.from_pretrained(models / "instruct").named_parameters())
    own = {name: parameter.detach().double() - start[name].detach().double() for name, parameter in module.model.named_parameters()}
    (row,) = history(tmp_path / "lata")
    for name, expert in experts.items():
        stored = {key: parameter.detach().double() - start[key].detach().double() for key, parameter in expert.named_parameters()}
        for prefix, value in {"": row[f"cosine/{name}"], **{f"{layer}.": value for layer, value in row["cosines"][name].items()}}.items():
            sides = [torch.cat([side[key].flatten() for key in side if key.startswith(prefix)]) for side in (own, stored)]
            assert value == pytest.approx(torch.nn.functional.cosine_similarity(*sides, dim=0).item(), abs=1e-7)
        assert run.callback_metrics[f"lata/cosine/{name}"].item() == pytest.approx(row[f"cosine/{name}"], abs=1e-6)


def test_without_an_instruction_vector_the_table_shows_norms_and_the_log_what_one_would_add(tmp_path, instruct, capsys, caplog):
    with caplog.at_level("INFO"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Module(instruct), batches())
    printed = capsys.readouterr().out
    assert "lata: norms at step 12 (blocks of model.layers)" in printed
    assert "task norm" in printed
    assert "alignment" not in printed
    assert any("norms only, as there is no instruction vector" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("known", [True, False])
def test_the_progress_bar_shows_one_figure_of_lata(tmp_path, models, instruct, known):
    fitting = trainer(tmp_path, LATACallback(models / "instruction" if known else None, table=False, output_dir=tmp_path / "lata"))
    fitting.fit(Module(instruct), batches())
    shown = {key for key in fitting.progress_bar_metrics if key.startswith("lata/")}
    assert shown == {"lata/alignment" if known else "lata/task_norm"}
    assert {"lata/task_norm"} <= set(fitting.callback_metrics)


def test_a_callback_plots_its_run_and_nothing_before_it(tmp_path, models, instruct):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    callback = LATACallback(models / "instruction", table=False, output_dir=tmp_path / "lata")
    with pytest.raises(LataError, match="nothing to plot yet"):
        callback.plot()
    trainer(tmp_path, callback).fit(Module(instruct), batches())
    given, panel = pyplot.subplots()
    figure, axes = callback.plot(panel)
    assert (figure, axes) == (given, panel)
    (image,) = axes.get_images()
    rows = [json.loads(line) for line in (tmp_path / "lata/history.jsonl").read_text().splitlines()]
    expected = [[stats["alignment"] for stats in row["layers"].values()] for row in rows]
    assert [pytest.approx(row) for row in expected] == image.get_array().tolist()
    pyplot.close(given)


def test_an_artifact_that_no_logger_takes_is_refused_before_the_first_step(tmp_path, instruct):
    module = Module(instruct)
    with pytest.raises(LataError, match="needs a WandbLogger among the trainer's loggers"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata", log_artifact=True), logger=CSVLogger(tmp_path)).fit(module, batches())
    with pytest.raises(LataError, match="export leaves it out"):
        LATACallback(log_artifact=True, export=())


def test_the_saved_vector_is_sent_to_wandb_on_request(tmp_path, instruct, monkeypatch):
    sent = []
    monkeypatch.setattr(callback_module, "check_artifact", lambda loggers: None)
    monkeypatch.setattr(callback_module, "log_artifact", lambda loggers, name, path: sent.append((name, path, path.is_dir())))
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata", table=False, log_artifact=True)).fit(Module(instruct), batches())
    assert sent == [("lata", tmp_path / "lata/task_vector", True)]


# --- capture, resume, refusals -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_history_and_vector_of_the_uninterrupted_one(tmp_path, models):
    def run(directory, epochs, resume=None):
        callback = LATACallback(models / "instruction", output_dir=directory / "lata", table=False)
        checkpoint = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
        module = Module(LlamaForCausalLM.from_pretrained(models / "instruct"))
        trainer(tmp_path, callback, checkpoint, max_epochs=epochs, enable_checkpointing=True).fit(module, batches(), ckpt_path=resume)
        return callback

    run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    # What a run that is killed while it exports leaves behind must not stand in the way of the next.
    for name in (".task_vector.partial-new", ".task_vector.partial-abcd"):
        (tmp_path / "parts/lata" / name).mkdir()
    # Resuming from the first of two epochs: the line of the second one must not appear twice.
    run(tmp_path / "parts", 3, tmp_path / "parts" / "epoch=0.ckpt")
    assert history(tmp_path / "parts/lata") == history(tmp_path / "whole/lata")
    one, other = (TaskVector.open(tmp_path / name / "lata/task_vector") for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not [path for path in (tmp_path / "parts/lata").iterdir() if ".partial" in path.name]


def test_resuming_with_a_model_built_from_other_weights_is_refused_and_base_weights_mends_it(tmp_path, models):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Module(LlamaForCausalLM.from_pretrained(models / "instruct"))
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback, checkpoint, max_epochs=1, enable_checkpointing=True).fit(module, batches())
    resume = tmp_path / "epoch=0.ckpt"
    with pytest.raises(LataError, match=r"cannot be had any more.*base_weights="):
        trainer(tmp_path, LATACallback(models / "instruction", output_dir=tmp_path / "lata")).fit(
            Module(tiny_llama(seed=9)), batches(), ckpt_path=resume
        )
    mended = LATACallback(models / "instruction", base_weights=str(models / "instruct"), output_dir=tmp_path / "lata", table=False)
    module = Module(tiny_llama(seed=9))
    trainer(tmp_path, mended).fit(module, batches(), ckpt_path=resume)
    module.model.save_pretrained(tmp_path / "tuned")
    expected = TaskVector.between(models / "instruct", tmp_path / "tuned")
    vector = TaskVector.open(tmp_path / "lata/task_vector")
    assert all(torch.equal(vector[name], expected[name]) for name in expected)


def test_resuming_a_run_that_never_had_the_callback_is_refused(tmp_path, models, instruct):
    checkpoint = ModelCheckpoint(tmp_path, filename="plain")
    trainer(tmp_path, checkpoint, max_epochs=1, enable_checkpointing=True).fit(Module(instruct), batches())
    with pytest.raises(LataError, match="without state of the callback"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Module(instruct), batches(), ckpt_path=tmp_path / "plain.ckpt")


def test_weights_loaded_when_training_starts_are_taken_as_the_start(tmp_path, models):
    class Late(Module):
        def on_train_start(self):
            self.model.load_state_dict(LlamaForCausalLM.from_pretrained(models / "instruct").state_dict())

    module = Late(tiny_llama(seed=5))
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    with pytest.warns(UserWarning, match="weights were loaded after the fit had started"):
        trainer(tmp_path, callback).fit(module, batches())
    module.model.save_pretrained(tmp_path / "tuned")
    vector, expected = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(models / "instruct", tmp_path / "tuned")
    assert all(torch.equal(vector[name], expected[name]) for name in expected)


def test_a_model_built_in_configure_model_is_captured(tmp_path, models):
    class Built(Module):
        def __init__(self):
            super().__init__(None)

        def configure_model(self):
            if self.model is None:
                self.model = LlamaForCausalLM.from_pretrained(models / "instruct")

    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(Built(), batches())
    assert callback.alignment.layers["model.layers.0"].task_norm > 0


def test_base_weights_that_the_model_does_not_start_from_are_refused(tmp_path, models, instruct):
    callback = LATACallback(base_weights=str(models / "base"), output_dir=tmp_path / "lata")
    with pytest.raises(BaseMismatchError, match="does not start from"):
        trainer(tmp_path, callback).fit(Module(instruct), batches())


def test_another_fit_of_the_same_trainer_keeps_the_start(tmp_path, models, instruct):
    module, callback = Module(instruct), LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, batches())
    run.fit_loop.max_epochs = 2
    run.fit(module, batches())
    module.model.save_pretrained(tmp_path / "tuned")
    vector, expected = TaskVector.open(tmp_path / "lata/task_vector"), TaskVector.between(models / "instruct", tmp_path / "tuned")
    assert all(torch.equal(vector[name], expected[name]) for name in expected)


def test_the_state_is_small_and_loads_with_weights_only(tmp_path, models, instruct):
    checkpoint = ModelCheckpoint(tmp_path, filename="kept")
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback, checkpoint, max_epochs=1, enable_checkpointing=True).fit(Module(instruct), batches())
    state = torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert (state["version"], state["last_step"], len(state["fingerprint"])) == (1, 6, 30)
    assert len(json.dumps(state)) < 150 * 30
    with pytest.raises(LataError, match="version 2"):
        callback.load_state_dict({**state, "version": 2})


def test_fast_dev_run_writes_no_file(tmp_path, models, instruct, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path / "root", LATACallback(models / "instruction", output_dir=tmp_path / "lata"), fast_dev_run=True).fit(
        Module(instruct), batches()
    )
    assert list(tmp_path.iterdir()) == []


def test_validation_alone_needs_nothing(tmp_path, instruct):
    class Validated(Module):
        def validation_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

    trainer(tmp_path, LATACallback("no/such/vector", output_dir=tmp_path / "lata")).validate(Validated(instruct), batches(), verbose=False)


def test_an_output_directory_of_another_run_is_refused_before_training(tmp_path, models, instruct):
    (tmp_path / "lata/task_vector").mkdir(parents=True)
    module = Module(instruct)
    with pytest.raises(OutputError, match="of another run"):
        trainer(tmp_path, LATACallback(models / "instruction", output_dir=tmp_path / "lata")).fit(module, batches())
    assert module.losses == []


def test_an_instruction_vector_that_is_zero_in_a_layer_is_refused_before_training(tmp_path, models, instruct):
    changed = LlamaForCausalLM.from_pretrained(models / "base")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.add_(1)
    TaskVector.between(models / "base", changed).save(tmp_path / "partial")
    module = Module(instruct)
    with pytest.raises(WeightingError, match=r"zero in 2: \['model.layers.0', 'model.layers.2'\] of 3 layers"):
        trainer(tmp_path, LATACallback(tmp_path / "partial", output_dir=tmp_path / "lata")).fit(module, batches())
    assert module.losses == []


def test_an_instruction_vector_of_another_architecture_is_refused(tmp_path, instruct):
    base = tiny_llama(num_hidden_layers=2)
    TaskVector.between(base, shifted_copy(base)).save(tmp_path / "other")
    with pytest.raises(LayoutMismatchError, match="must hold the same tensors"):
        trainer(tmp_path, LATACallback(tmp_path / "other", output_dir=tmp_path / "lata")).fit(Module(instruct), batches())


def shifted_copy(model):
    state = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    return state


def test_weights_that_became_nan_are_named(tmp_path, models, instruct):
    class Diverge(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                pl_module.model.lm_head.weight[0, 0] = float("nan")

    with pytest.raises(CorruptFileError, match="lm_head.weight"):
        trainer(tmp_path, Diverge(), LATACallback(models / "instruction", output_dir=tmp_path / "lata")).fit(Module(instruct), batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "middle"}, "unknown start 'middle'; choose one of instruct, base"),
        ({"weighting": "cubic"}, "unknown weighting 'cubic'; choose one of linear, log, threshold, none"),
        ({"level": "head"}, "unknown level 'head'; choose one of block, submodule, tensor"),
        ({"every_n_epochs": -1}, "every_n_epochs must be at least 0"),
        ({"every_n_train_steps": 0}, "every_n_train_steps at least 1"),
        ({"export": ("gguf",)}, "export must be"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_arguments_without_meaning_are_refused_at_once(arguments, message):
    with pytest.raises(LataError, match=message):
        LATACallback(**arguments)


def test_a_model_name_that_does_not_exist_lists_the_children(tmp_path, instruct):
    with pytest.raises(LataError, match=r"no submodule 'student'; its children are \['model'\]"):
        trainer(tmp_path, LATACallback(model="student", output_dir=tmp_path / "lata")).fit(Module(instruct), batches())


def test_two_models_side_by_side_have_to_be_told_apart(tmp_path, instruct):
    class Two(Module):
        def __init__(self):
            super().__init__(instruct)
            self.teacher = tiny_llama(seed=2).requires_grad_(False)

    with pytest.raises(LataError, match="say which one is meant, such as model='model'"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Two(), batches())
    trainer(tmp_path, LATACallback(model="model", output_dir=tmp_path / "lata")).fit(Two(), batches())
    assert "model.embed_tokens.weight" in TaskVector.open(tmp_path / "lata/task_vector")


def test_quantised_weights_are_refused(tmp_path, instruct):
    packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    instruct.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(LataError, match=r"model.layers.0.mlp.up_proj.weight.*If the model is quantised"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Module(instruct), batches())
