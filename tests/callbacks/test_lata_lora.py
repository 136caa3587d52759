"""LoRA in training: the vector is merge_and_unload() after training minus the weights before wrapping, both in float64, from peft alone."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from conformance import Recorded, check_same, same_batches, steps
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import EXPECTED_WARNINGS, Module, batches, tiny_llama, trainer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector, align
from lata_lightning.numerics.low_rank import LowRank
from lata_lightning.vectors.artefact import verify

pytestmark = EXPECTED_WARNINGS

CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "patterns and rsLoRA": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "all linear layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained copies and biases": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "PiSSA": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "fast PiSSA": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"},
}


def wrapped(model, **options):
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))


def instruct(models):
    return LlamaForCausalLM.from_pretrained(models / "instruct")


def merged_by_peft(module, directory):
    """What peft itself makes of the trained adapter, as a saved model; in float64, so that the sum does not round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.model.double().merge_and_unload().save_pretrained(directory)
    return directory


def close(exported, expected, rtol=1e-5, atol=1e-7):
    assert set(exported) == set(expected)
    for name in expected:
        torch.testing.assert_close(exported[name].double(), expected[name].double(), rtol=rtol, atol=atol)


def run(directory, model, *callbacks, data=None, lata=None, resume=None, module=None, **options):
    """A fit of a wrapped model; gives module, callback and the exported vector (None if there is none yet)."""
    module = module or Module(model)
    callback = LATACallback(**{"output_dir": directory / "lata", "table": False, **(lata or {})})
    trainer(directory, callback, *callbacks, **options).fit(module, data or batches(), ckpt_path=resume)
    path = directory / "lata/task_vector"
    return module, callback, TaskVector.open(path) if path.is_dir() else None


# --- what is measured and exported ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_lora_run_exports_what_merging_the_adapter_would_add(tmp_path, models, options):
    module, callback, exported = run(tmp_path, wrapped(instruct(models), **options), lata={"instruction_vector": models / "instruction"})
    expected = TaskVector.between(models / "instruct", merged_by_peft(module, tmp_path / "tuned"))
    residual = str(options.get("init_lora_weights")).startswith(("pissa", "olora"))
    # Such an initialisation rounds the base weights.
    close(exported, expected, atol=1e-6 if residual else 1e-7)
    assert exported.unchanged == {name for name in expected if expected[name].abs().max() < 1e-12}
    measured = align(expected, TaskVector.open(models / "instruction"), check_base=False)
    assert callback.alignment.values == pytest.approx(measured.values, abs=1e-5 if residual else 1e-6)
    instruction = TaskVector.open(models / "instruction").manifest
    starts_at_zero = "init_lora_weights" not in options or options["init_lora_weights"] == "gaussian"
    assert exported.manifest.start_identity.content_hash == (instruction.tuned_identity.content_hash if starts_at_zero else None)
    assert verify(tmp_path / "lata/task_vector") > 0


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("start", ["instruct", "base"])
@pytest.mark.parametrize("low", [False, True], ids=["dense instruction vector", "instruction vector in factors"])
def test_no_dense_difference_is_formed_while_measuring_and_exporting(tmp_path, models, low, start, init, monkeypatch):
    instruction = TaskVector.open(models / "instruction")
    if low:
        other = wrapped(instruct(models), target_modules="all-linear", init_lora_weights=False)
        instruction = TaskVector.between(models / "instruct", other, kind="instruction").save(tmp_path / "instruction")
    lata = {"instruction_vector": instruction, "start": start, "every_n_train_steps": 2, "weighting": "none" if low else "linear"}
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "dense", lambda *_: pytest.fail("a dense matrix was formed"))
        module, callback, exported = run(tmp_path, wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights=init), lata=lata)
    expected = TaskVector.between(models / "instruct", merged_by_peft(module, tmp_path / "tuned"), start_kind=start)
    measured = align(expected, instruction, check_base=False)
    assert callback.alignment.values == pytest.approx(measured.values, abs=1e-5)
    norms = {layer: stats.task_norm for layer, stats in measured.layers.items()}
    assert {layer: stats.task_norm for layer, stats in callback.alignment.layers.items()} == pytest.approx(norms, rel=1e-4)
    assert all(exported.low_rank(name) is not None for name in set(exported) - exported.unchanged)


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_adapters_on_tied_embeddings_give_what_merging_gives(tmp_path, targets, ensured):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "start")
    model = wrapped(LlamaForCausalLM.from_pretrained(tmp_path / "start"), target_modules=targets, ensure_weight_tying=ensured)
    module, _, exported = run(tmp_path, model)
    close(exported, TaskVector.between(tmp_path / "start", merged_by_peft(module, tmp_path / "tuned")))
    assert exported["model.embed_tokens.weight"].any()


def test_a_trained_copy_of_a_tied_weight_stays_tied_or_is_refused(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "start")

    def model(**options):
        return wrapped(LlamaForCausalLM.from_pretrained(tmp_path / "start"), target_modules=["q_proj"], **options)

    module, _, exported = run(tmp_path, model(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    close(exported, TaskVector.between(tmp_path / "start", merged_by_peft(module, tmp_path / "tuned")))
    for copies in (["embed_tokens"], ["lm_head"]):
        refused(tmp_path / copies[0], model(modules_to_save=copies), "ensure_weight_tying=True")


def test_several_active_adapters_add_up(tmp_path, models):
    model = wrapped(instruct(models), target_modules=["q_proj"])
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "two"])
    module, _, exported = run(tmp_path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.model.double().merge_and_unload(adapter_names=["default", "two"]).save_pretrained(tmp_path / "tuned")
    close(exported, TaskVector.between(models / "instruct", tmp_path / "tuned"))
    assert exported.low_rank("model.layers.0.self_attn.q_proj.weight").rank == 6


def test_an_adapter_that_is_not_active_does_not_count(tmp_path, models):
    model = wrapped(instruct(models), target_modules=["q_proj"])
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    module, _, exported = run(tmp_path, model)
    close(exported, TaskVector.between(models / "instruct", merged_by_peft(module, tmp_path / "tuned")))


def test_a_second_round_is_measured_from_where_the_first_ended(tmp_path, models):
    first, _, _ = run(tmp_path / "first", wrapped(instruct(models), target_modules=["q_proj"]))
    first.model.save_pretrained(tmp_path / "adapter")
    between = {name: tensor.clone() for name, tensor in merged_state(first.model).items()}
    model = peft.PeftModel.from_pretrained(instruct(models), tmp_path / "adapter", is_trainable=True)
    second, _, exported = run(tmp_path / "second", model)
    after = merged_state(second.model)
    for name in exported:
        torch.testing.assert_close(exported[name].double(), after[name] - between[name], rtol=1e-5, atol=1e-8)
    # The start is no directory, and its whole weights never stood anywhere to be hashed.
    assert (exported.manifest.start_identity.location, exported.manifest.start_identity.content_hash) == (None, None)
    # The directories of both rounds say the same.
    second.model.float().save_pretrained(tmp_path / "adapter 2")
    close(TaskVector.between(tmp_path / "adapter", tmp_path / "adapter 2"), exported, rtol=1e-5, atol=1e-8)


def merged_state(model):
    """The float64 weights of a wrapped model and what its one adapter adds, without changing it."""
    base = model.get_base_model()
    found = {}
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        layer = base.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
        tensor = parameter.detach().double()
        if ".base_layer." in name:
            product = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
            tensor = tensor + layer.scaling["default"] * product
        found[name.replace(".base_layer.", ".")] = tensor
    return found


def test_lora_on_conv1d_is_transposed_as_the_checkpoint_stores_it(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "start")
    module, _, exported = run(tmp_path, wrapped(model, target_modules=["c_attn"], fan_in_fan_out=True))
    close(exported, TaskVector.between(tmp_path / "start", merged_by_peft(module, tmp_path / "tuned")))


class Pictures(Module):
    """A small network with convolutions that is no transformers model."""

    def training_step(self, batch, batch_idx):
        loss = self.model(batch.float()[:, None, :, None].expand(-1, 4, -1, 6) / 32).square().mean()
        self.losses.append(loss.item())
        return loss


def network(groups=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 6 * 4, 3))


def test_lora_on_convolutions_and_modules_of_no_library_is_exact(tmp_path):
    start = network()
    module = Pictures(wrapped(network(), target_modules=["0", "2", "4"]))
    _, _, exported = run(tmp_path, None, module=module, lata={"layers": r"\d"})
    tuned = module.model.double().merge_and_unload().state_dict()
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(exported[name].double(), tuned[name] - tensor.double(), rtol=1e-5, atol=1e-7)
    assert exported.low_rank("0.weight").rank == 4
    assert exported["0.weight"].any()


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_factors_are_measured_in_the_precision_the_trainer_holds(tmp_path, models, precision, init):
    model, lata = (
        wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights=init),
        {"instruction_vector": models / "instruction"},
    )
    with warnings.catch_warnings():
        # Rounding by the trainer is no loading of other weights.
        warnings.filterwarnings("error", "weights were loaded after")
        module, callback, exported = run(tmp_path, model, lata=lata, precision=precision)
    start = wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights=init)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "bf16-mixed": torch.float32}[precision]
    before, after = merged_state(start.to(dtype)), merged_state(module.model)
    assert next(module.parameters()).dtype == dtype
    for name in set(exported) - exported.unchanged:
        want = after[name] - before[name]
        assert (exported[name].double() - want).norm() < 1e-6 * want.norm()
    names = [name for name in after if name.startswith("model.layers.0.")]
    norm = torch.cat([(after[name] - before[name]).flatten() for name in names]).norm().item()
    assert callback.alignment.layers["model.layers.0"].task_norm == pytest.approx(norm, rel=1e-7)


def test_factors_that_started_large_and_moved_little_keep_their_digits(tmp_path, models):
    model = wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights="pissa")
    before = merged_state(model)
    module = Module(model, learning_rate=1e-6)
    _, callback, exported = run(tmp_path, None, module=module, lata={"dtype": "bfloat16"}, max_epochs=1)
    after = merged_state(model)
    norms = []
    for name in set(exported) - exported.unchanged:
        want = after[name] - before[name]
        norms.append(want.norm().item())
        assert (exported[name].double() - want).norm() < 0.01 * want.norm()
    assert callback.alignment is not None
    last = json.loads((tmp_path / "lata/history.jsonl").read_text().splitlines()[-1])
    assert last["task_norm"] == pytest.approx(torch.tensor(norms).double().norm().item(), rel=1e-5)


def test_before_the_first_step_counts_nothing_was_learned(tmp_path, models):
    module = Module(wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights="pissa"), learning_rate=0.0)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)
    _, callback, exported = run(tmp_path, None, module=module, lata={"instruction_vector": models / "instruction", "weighting": "none"})
    assert set(callback.alignment.values.values()) == {1.0}
    assert not any(exported[name].any() for name in exported)


# peft advises EVA to save memory, which a test has enough of.
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
@pytest.mark.parametrize("kind", ["CorDA", "EVA"])
def test_initialisations_from_data_are_measured_from_what_they_set(tmp_path, models, kind):
    model, data = instruct(models), list(batches())
    if kind == "CorDA":
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="corda", corda_config=CordaConfig())
        preprocess_corda(model, config, run_model=lambda: [model(input_ids=batch[:1]) for batch in data])
        model = peft.get_peft_model(model, config)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
        model = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(model, [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in data])
    module, _, exported = run(tmp_path, model)
    close(exported, TaskVector.between(models / "instruct", merged_by_peft(module, tmp_path / "tuned")), atol=1e-6)


# --- what it costs, and what it leaves as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "pissa"])
def test_training_an_adapter_is_bit_identical_with_and_without_the_callback(tmp_path, models, init):
    losses, states = [], []
    for callbacks in ([], [LATACallback(models / "instruction", every_n_train_steps=1, output_dir=tmp_path / "lata", table=False)]):
        module = Module(wrapped(instruct(models), target_modules=["q_proj"], lora_dropout=0.2, init_lora_weights=init))
        torch.manual_seed(3)
        trainer(tmp_path, *callbacks).fit(module, batches())
        losses.append(module.losses)
        states.append(module.state_dict())
    assert losses[0] == losses[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("init", [True, "pissa"])
def test_nothing_of_a_frozen_base_is_copied_or_stored(tmp_path, models, init):
    module, callback, exported = run(tmp_path, wrapped(instruct(models), target_modules=["q_proj", "v_proj"], init_lora_weights=init))
    assert callback.run.tracker.start_weights.copied_bytes == 0
    factors = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    stored = (tmp_path / "lata/task_vector/delta.safetensors").stat().st_size
    assert stored < factors * (1 if init is True else 2) + 4000
    assert len(exported) == 30


# --- resuming ------------------------------------------------------------------------------------------------------------------------------


class Fail(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("the power went off")


def part(directory, models, *, init=True, fail=None, resume=None, build=None, seed=4):
    model = wrapped_with_seed(models, init, seed)
    module = build(model) if build else Recorded(model)
    keep = ModelCheckpoint(directory, filename="kept", every_n_train_steps=3)
    lata = {"instruction_vector": models / "instruction", "every_n_train_steps": 4}
    more = [keep] if fail is None else [Fail(fail), keep]
    return run(
        directory, None, *more, module=module, lata=lata, data=same_batches(), resume=resume, max_epochs=3, enable_checkpointing=True
    )


def wrapped_with_seed(models, init, seed):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=init)
        return peft.get_peft_model(instruct(models), config)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora", False], ids=str)
def test_a_resumed_lora_run_leaves_what_the_uninterrupted_one_leaves(tmp_path, models, init):
    part(tmp_path / "whole", models, init=init)
    with pytest.raises(RuntimeError, match="the power went off"):
        part(tmp_path / "parts", models, init=init, fail=11)
    part(tmp_path / "parts", models, init=init, resume=tmp_path / "parts/kept.ckpt")
    assert steps(tmp_path / "whole/lata") == [4, 6, 8, 12, 16, 18]
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_run_that_starts_at_zero_may_draw_other_factors_when_it_is_resumed(tmp_path, models):
    part(tmp_path / "whole", models)
    with pytest.raises(RuntimeError, match="the power went off"):
        part(tmp_path / "parts", models, fail=11)
    part(tmp_path / "parts", models, resume=tmp_path / "parts/kept.ckpt", seed=5)
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_run_that_starts_elsewhere_may_not(tmp_path, models):
    with pytest.raises(RuntimeError, match="the power went off"):
        part(tmp_path / "parts", models, init=False, fail=11)
    with pytest.raises(LataError, match=r"cannot be had any more: the model was built with other values than at the first start in 3"):
        part(tmp_path / "parts", models, init=False, resume=tmp_path / "parts/kept.ckpt", seed=5)


def test_a_changed_base_is_refused_when_a_run_is_resumed(tmp_path, models):
    with pytest.raises(RuntimeError, match="the power went off"):
        part(tmp_path / "parts", models, init="pissa", fail=11)
    with pytest.raises(LataError, match="built with other values than at the first start"):
        part(tmp_path / "parts", models, init="olora", resume=tmp_path / "parts/kept.ckpt")


class Built(Recorded):
    """Puts the model in place only when the fit is under way."""

    def __init__(self, model):
        super().__init__(None)
        self.late = [model]

    def configure_model(self):
        if self.model is None:
            self.model = self.late[0]


def late(models, init, directory, fail=None, resume=None):
    module = Built(wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights=init))
    keep = ModelCheckpoint(directory, filename="kept", every_n_train_steps=3)
    more = [keep] if fail is None else [Fail(fail), keep]
    lata = {"instruction_vector": models / "instruction"}
    run(directory, None, *more, module=module, lata=lata, data=same_batches(), resume=resume, max_epochs=3, enable_checkpointing=True)


def test_a_model_of_configure_model_resumes_where_its_adapters_started_at_zero(tmp_path, models):
    late(models, True, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power went off"):
        late(models, True, tmp_path / "parts", fail=11)
    late(models, True, tmp_path / "parts", resume=tmp_path / "parts/kept.ckpt")
    check_same(tmp_path / "parts/lata", tmp_path / "whole/lata")


def test_a_model_of_configure_model_with_another_start_is_refused_when_resumed(tmp_path, models):
    with pytest.raises(RuntimeError, match="the power went off"):
        late(models, "pissa", tmp_path / "parts", fail=11)
    with pytest.raises(LataError, match="cannot be had any more"):
        late(models, "pissa", tmp_path / "parts", resume=tmp_path / "parts/kept.ckpt")


@pytest.mark.parametrize("init", [True, "pissa"])
def test_two_ddp_processes_give_the_vector_of_the_merged_model(tmp_path, models, init):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("lora_run.py"), models, tmp_path, json.dumps(init)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    exported = TaskVector.open(tmp_path / "lata/task_vector")
    expected = TaskVector.between(models / "instruct", tmp_path / "tuned")
    close(exported, expected, atol=1e-7 if init is True else 1e-6)
    measured = align(expected, TaskVector.open(models / "instruction"), check_base=False)
    assert exported.manifest.alignment.values == pytest.approx(measured.values, abs=1e-5)


# --- quantised bases -----------------------------------------------------------------------------------------------------------------------


class Packed(nn.Linear):
    """A linear layer whose weight is held as bytes."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        size = layer.weight.abs().max() / 127
        self.weight = nn.Parameter((layer.weight / size).round().to(torch.int8), requires_grad=False)
        self.register_buffer("size", size.detach(), persistent=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.size)


def packed(model, make):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], make(layer))
    return model


def check_packed(directory, models, make):
    check_factors(directory, models, wrapped(packed(instruct(models), make), target_modules=["q_proj", "up_proj"]), 6)


def check_factors(directory, models, model, count):
    # Tensor classes of their own need not know how to be compared.
    plain = {name: parameter for name, parameter in model.named_parameters() if type(parameter.data) is torch.Tensor}
    base = {name: parameter.clone() for name, parameter in plain.items() if "base_layer" in name}
    lata = {"instruction_vector": models / "instruction"}
    _, callback, exported = run(directory, model, lata=lata, max_epochs=1)
    assert all(torch.equal(parameter, dict(model.named_parameters())[name]) for name, parameter in base.items())
    assert callback.run.tracker.start_weights.copied_bytes == 0
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            expected[f"{name}.weight"] = (1.5 * product).detach()
    assert len(expected) == count
    assert set(exported) - exported.unchanged == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name].double(), tensor, rtol=1e-6, atol=1e-9)
    direction = TaskVector.open(models / "instruction")
    for layer, stats in callback.alignment.layers.items():
        names = [name for name in direction if name.startswith(layer + ".")]
        along = torch.cat([direction[name].double().flatten() for name in names])
        task = torch.cat([expected.get(name, torch.zeros(direction.shape(name)).double()).flatten() for name in names])
        assert stats.alignment == pytest.approx(torch.nn.functional.cosine_similarity(task + along, along, dim=0).item(), abs=1e-9)
    assert exported.manifest.start_identity.content_hash is None
    # From memory, over the full-precision weights.
    close(TaskVector.between(models / "instruct", model), exported)


def test_adapters_on_integer_weights_are_measured_in_their_factors(tmp_path, models):
    check_packed(tmp_path, models, Packed)


class Rounded(torch.Tensor):
    """A weight of eight bits in a tensor class of its own that calls itself float32, as those of torchao do."""

    @staticmethod
    def __new__(cls, values, size):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, size):
        self.values_, self.size_ = values, size

    def __tensor_flatten__(self):
        return ["values_", "size_"], None

    def full(self):
        return self.values_.float() * self.size_

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(function(args[0].values_), args[0].size_)
        args = torch.utils._pytree.tree_map_only(cls, cls.full, args)
        return function(*args, **torch.utils._pytree.tree_map_only(cls, cls.full, kwargs or {}))


def test_adapters_on_weights_of_another_tensor_class_are_measured_in_their_factors(tmp_path, models):
    def make(layer):
        size = layer.weight.detach().abs().max() / 127
        values = Rounded((layer.weight.detach() / size).round().to(torch.int8), size)
        layer.weight = nn.Parameter(values, requires_grad=False)
        return layer

    check_packed(tmp_path, models, make)


def test_a_model_that_torchao_quantised_to_eight_bits_is_measured_in_its_factors(tmp_path, models):
    torchao = pytest.importorskip("torchao.quantization")
    model = instruct(models)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda part, name: isinstance(part, nn.Linear) and name != "lm_head")
    check_factors(tmp_path, models, wrapped(model, target_modules=["q_proj", "up_proj"]), 6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_adapters_on_weights_of_four_bits_are_measured_in_their_factors(tmp_path, models, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)

    def make(layer):
        found = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type=kind)
        found.load_state_dict({"weight": layer.weight.detach()})
        return found.to("cpu")

    check_packed(tmp_path, models, make)


def test_a_model_that_transformers_loads_in_four_bits_is_measured_in_its_factors(tmp_path, models):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(models / "instruct", quantization_config=config, device_map="cpu")
    model = wrapped(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), target_modules="all-linear")
    # In evaluation mode bitsandbytes packs the weights anew on some processors.
    check_factors(tmp_path, models, model.train(), 21)


def test_a_packed_weight_that_does_not_tell_its_shape_is_refused(tmp_path, models):
    model = wrapped(instruct(models), target_modules=["q_proj"])
    norm = model.get_base_model().model.norm
    norm.weight = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    refused(tmp_path, model, "model.norm.weight is quantised in a way that does not tell its shape")


# --- refusals ------------------------------------------------------------------------------------------------------------------------------


def refused(directory, model, message, module=None):
    """The fit is refused before its first step, with one line."""
    module = module or Module(model)
    with pytest.raises(LataError, match=message) as caught:
        run(directory, None, module=module)
    assert module.losses == []
    assert "\n" not in str(caught.value)
    assert not (directory / "lata/task_vector").exists()


OTHER_KINDS = {
    "DoRA": (lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA change 3: .*lata extract START ADAPTER"),
    "LoRA bias": (lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "LoRA with a bias change"),
    "trained tokens": (
        lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        "trainable_tokens change 1: .*embed_tokens.weight",
    ),
    "repeated layers": (lambda: peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)]), "layer_replication"),
    "IA3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3 change"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["k_proj"]), "loha change"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=["k_proj"]), "lokr change"),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["k_proj"], total_step=10), "adalora change"),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "of the type PROMPT_TUNING: it changes no weight",
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "of the type PREFIX_TUNING: it changes no weight",
    ),
}


@pytest.mark.parametrize(("make", "message"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_other_adapters_are_refused_before_training(tmp_path, make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(attention_bias=True), make())
    refused(tmp_path, model, message)


def test_adapters_on_parameters_that_are_no_weight_of_a_layer_are_refused(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    refused(tmp_path, wrapped(attention, target_modules=["attention"]), "MultiheadAttention")
    holder = wrapped(nn.ModuleDict({"part": Holder()}), target_modules=[], target_parameters=["part.table"])
    refused(tmp_path, holder, "ParamWrapper")


def test_a_grouped_convolution_is_refused(tmp_path):
    refused(tmp_path, wrapped(network(groups=2), target_modules=["0"]), "grouped convolution")


# The older of torch's two ways to compute a weight is meant.
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_is_computed_from_others_is_refused(tmp_path):
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)))
    refused(tmp_path, wrapped(model, target_modules=["0"]), "computed from others")


def test_a_merged_adapter_is_refused(tmp_path):
    model = wrapped(tiny_llama(), target_modules=["q_proj"])
    model.merge_adapter()
    refused(tmp_path, model, "unmerge_adapter")


def test_a_base_weight_that_is_trained_as_well_is_refused(tmp_path):
    model = wrapped(tiny_llama(), target_modules=["q_proj"])
    model.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    refused(tmp_path, model, "trains the weight under it as well")


# A model of a test was loaded from nowhere.
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_adapters_that_no_peft_model_holds_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    added, injected = tiny_llama(), tiny_llama()
    added.add_adapter(config)
    peft.inject_adapter_in_model(config, injected)
    mixed = peft.get_peft_model(tiny_llama(), config, mixed=True)
    for model in (added, injected, mixed):
        refused(tmp_path, model, r"there are adapters without it on 3: .*Wrap the model itself")


@pytest.mark.parametrize(("first", "whose"), [("lora_A", "LitGPT or loralib"), ("lora_a", "torchtune or MLX")])
def test_lora_of_other_libraries_is_refused_before_training(tmp_path, first, whose):
    model = tiny_llama()
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_parameter(first, nn.Parameter(torch.zeros(2, 16)))
    refused(
        tmp_path,
        model,
        rf"the model in training holds LoRA of {whose} that is not merged, 1: \['model.layers.0.self_attn.q_proj.{first}'\]",
    )


def test_lora_without_adapters_is_refused(tmp_path):
    with pytest.raises(LataError, match="needs a model wrapped by peft"):
        run(tmp_path, tiny_llama(), lata={"base_weights": "lora"})


def test_a_start_that_is_not_where_the_model_comes_from_is_refused(tmp_path, models):
    model = wrapped(instruct(models), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(LataError, match=r"the model does not start from .*base.*lm_head"):
        run(tmp_path, model, lata={"base_weights": str(models / "base")})


def test_adapters_that_are_loaded_after_the_fit_has_started_are_the_start(tmp_path, models):
    source = wrapped(instruct(models), target_modules=["q_proj"], init_lora_weights=False)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}

    class Loads(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.load_state_dict(state)

    before = merged_state(source)
    with pytest.warns(UserWarning, match="weights were loaded after the fit had started"):
        module, _, exported = run(tmp_path, wrapped(instruct(models), target_modules=["q_proj"]), Loads())
    after = merged_state(module.model)
    for name in exported:
        torch.testing.assert_close(exported[name].double(), after[name] - before[name], rtol=1e-5, atol=1e-7)
