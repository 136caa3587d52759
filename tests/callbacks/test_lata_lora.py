import warnings

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Module, batches, tiny_llama, trainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lata_lightning import LATACallback, LataError, TaskVector, align

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "patterns and rsLoRA": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained copies and biases": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
}


def wrapped(model, **options):
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))


def merged_by_peft(module, directory):
    """What peft itself makes of the trained adapter, as a saved model; in float64, so that the sum does not round."""
    merged = module.model.double().merge_and_unload()
    merged.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_lora_run_exports_what_merging_the_adapter_would_add(tmp_path, models, options):
    module = Module(wrapped(LlamaForCausalLM.from_pretrained(models / "instruct"), **options))
    callback = LATACallback(models / "instruction", output_dir=tmp_path / "lata", table=False)
    trainer(tmp_path, callback).fit(module, batches())
    exported = TaskVector.open(tmp_path / "lata/task_vector")
    expected = TaskVector.between(models / "instruct", merged_by_peft(module, tmp_path / "tuned"))
    assert set(exported) == set(expected)
    for name in expected:
        torch.testing.assert_close(exported[name].double(), expected[name], rtol=1e-5, atol=1e-7)
    untouched = {name for name in expected if not expected[name].any()}
    assert exported.unchanged == untouched
    measured = align(expected, TaskVector.open(models / "instruction"), check_base=False)
    assert callback.alignment.values == pytest.approx(measured.values, abs=1e-6)
    assert exported.manifest.start_identity.content_hash == TaskVector.open(models / "instruction").manifest.tuned_identity.content_hash


def test_lora_on_conv1d_is_transposed_as_the_checkpoint_stores_it(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "start")
    module = Module(wrapped(model, target_modules=["c_attn"], fan_in_fan_out=True))
    trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(module, batches())
    exported = TaskVector.open(tmp_path / "lata/task_vector")
    expected = TaskVector.between(tmp_path / "start", merged_by_peft(module, tmp_path / "tuned"))
    assert set(exported) == set(expected)
    for name in expected:
        torch.testing.assert_close(exported[name].double(), expected[name], rtol=1e-5, atol=1e-7)


def test_training_an_adapter_is_bit_identical_with_and_without_the_callback(tmp_path, models):
    losses = []
    for callbacks in ([], [LATACallback(models / "instruction", every_n_train_steps=1, output_dir=tmp_path / "lata", table=False)]):
        module = Module(wrapped(LlamaForCausalLM.from_pretrained(models / "instruct"), target_modules=["q_proj"], lora_dropout=0.2))
        torch.manual_seed(3)
        trainer(tmp_path, *callbacks).fit(module, batches())
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_nothing_of_a_frozen_base_is_copied(tmp_path, models):
    module = Module(wrapped(LlamaForCausalLM.from_pretrained(models / "instruct"), target_modules=["q_proj", "v_proj"]))
    callback = LATACallback(output_dir=tmp_path / "lata")
    trainer(tmp_path, callback).fit(module, batches())
    assert callback._tracker.kept.copied_bytes == 0


def test_a_resumed_lora_run_ends_with_the_vector_of_the_uninterrupted_one(tmp_path, models):
    def run(directory, epochs, resume=None):
        module = Module(wrapped(LlamaForCausalLM.from_pretrained(models / "instruct"), target_modules=["q_proj"]))
        checkpoint = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
        callback = LATACallback(models / "instruction", output_dir=directory / "lata", table=False)
        trainer(tmp_path, callback, checkpoint, max_epochs=epochs, enable_checkpointing=True).fit(module, batches(), ckpt_path=resume)

    run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    run(tmp_path / "parts", 2, tmp_path / "parts/epoch=0.ckpt")
    one, other = (TaskVector.open(tmp_path / name / "lata/task_vector") for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "is a variant of LoRA"),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is of the type IA3"),
        (lambda: peft.LoHaConfig(target_modules=["k_proj"]), "is of the type LOHA"),
    ],
)
def test_other_adapters_are_refused_before_training(tmp_path, make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Module(peft.get_peft_model(tiny_llama(), make()))
    with pytest.raises(LataError, match=message):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(module, batches())
    assert module.losses == []


def test_a_merged_adapter_is_refused(tmp_path):
    model = wrapped(tiny_llama(), target_modules=["q_proj"])
    model.merge_adapter()
    with pytest.raises(LataError, match="unmerge_adapter"):
        trainer(tmp_path, LATACallback(output_dir=tmp_path / "lata")).fit(Module(model), batches())
