import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from passed_warnings import CHECKPOINTS_EXIST, EMPTY_LOADER, FEW_WORKERS, LEAF_SPEC
from transformers import LlamaConfig, LlamaForCausalLM

from lata_lightning.errors import LataError, SourceError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.training.data import ChatDataModule
from lata_lightning.training.loading import load_causal_lm
from lata_lightning.training.module import CausalLMModule
from lata_lightning.training.optimizing import learning_rate_share

pytestmark = [FEW_WORKERS, LEAF_SPEC, EMPTY_LOADER, CHECKPOINTS_EXIST]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
PAIRS = [("copy ab", "ab"), ("copy cab", "cab"), ("copy a", "a"), ("copy longer", "longer"), ("copy b", "b")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=257,
        bos_token_id=None,
        eos_token_id=256,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class StopAfter(Callback):
    """Ends the training after so many epochs without changing what its schedule expects."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def chat(tokenizer, **changes):
    return ChatDataModule(tokenizer, {"copy": PAIRS}, **({"batches_per_epoch": 3, "tokens_per_batch": 64, "context_length": 32} | changes))


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    shares = [learning_rate_share(step, steps=13, warmup_steps=3, final_share=0.1) for step in (0, 1, 2, 3, 8, 13, 20)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1 + 0.9 / 2, 0.1, 0.1])


def test_a_training_all_warm_up_never_divides_by_zero():
    assert learning_rate_share(5, steps=5, warmup_steps=5, final_share=0.0) == 1.0


def test_the_model_is_put_into_training_mode():
    model = tiny_model().eval()
    assert CausalLMModule(model).model is model
    assert model.training


def test_matrices_are_decayed_and_norms_are_not_and_frozen_parameters_are_left_out(tokenizer):
    model = tiny_model()
    model.lm_head.weight.requires_grad = False
    trainer = Trainer(max_steps=1, **QUIET)
    trainer.fit(CausalLMModule(model, weight_decay=0.3), datamodule=chat(tokenizer))
    decayed, kept = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    # Per block q, k, v, o, gate, up, down and two norms; the embedding, the final norm; not the frozen head.
    assert (len(decayed["params"]), len(kept["params"])) == (2 * 7 + 1, 2 * 2 + 1)


def test_training_lowers_the_loss_and_logs_it(tokenizer):
    module = CausalLMModule(tiny_model(), learning_rate=1e-2)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, datamodule=chat(tokenizer, batches_per_epoch=30))
    assert trainer.callback_metrics["train_loss_step"] < 0.7 * math.log(260)
    assert trainer.callback_metrics["train_loss_epoch"] < math.log(260)


def test_the_validation_loss_weighs_every_label_the_same(tokenizer):
    module = CausalLMModule(tiny_model())
    data = chat(tokenizer, validation=PAIRS, tokens_per_batch=48)
    trainer = Trainer(**QUIET)
    trainer.validate(module, datamodule=data, verbose=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, answer in PAIRS:
            question, right = list(f"<{prompt}>".encode()), list(answer.encode())
            # A byte's id is found through the tokenizer, the rest of the row is spelled out.
            ids = [258, *tokenizer(prompt)["input_ids"], 259, *tokenizer(answer)["input_ids"], 256]
            chances = module.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for place in range(len(question), len(question) + len(right) + 1):
                total -= chances[place - 1, ids[place]].item()
                count += 1
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_training_equals_the_uninterrupted_one(tokenizer, tmp_path):
    def fit(model, stop_after=None, resume_from=None):
        trainer = Trainer(max_epochs=4, callbacks=[StopAfter(stop_after)] if stop_after else [], **QUIET)
        module = CausalLMModule(model, learning_rate=1e-2, warmup_steps=2)
        trainer.fit(module, datamodule=chat(tokenizer), ckpt_path=resume_from, weights_only=True if resume_from else None)
        return trainer, module

    _, whole = fit(tiny_model())
    halfway, _ = fit(tiny_model(), stop_after=2)
    halfway.save_checkpoint(tmp_path / "half.ckpt")
    trainer, resumed = fit(tiny_model(seed=99), resume_from=tmp_path / "half.ckpt")
    assert (halfway.global_step, trainer.global_step) == (6, 12)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_a_model_in_memory_is_not_a_hyperparameter_and_a_path_is(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "model" not in CausalLMModule(tiny_model()).hparams
    assert CausalLMModule(str(tmp_path), learning_rate=2e-4).hparams["model"] == str(tmp_path)


def test_a_directory_is_loaded_in_single_precision_unless_told_otherwise(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).lm_head.weight.dtype == torch.float32
    assert CausalLMModule(str(tmp_path), dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"cannot load '.*' as a causal language model"):
        CausalLMModule(str(tmp_path))


@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay", "warmup_steps"])
def test_a_negative_setting_is_refused(setting):
    with pytest.raises(LataError, match="must not be negative"):
        CausalLMModule(tiny_model(), **{setting: -1})


def test_a_final_learning_rate_above_the_peak_is_refused():
    with pytest.raises(LataError, match=r"between 0 and 1, not 1\.5"):
        CausalLMModule(tiny_model(), final_learning_rate_share=1.5)
