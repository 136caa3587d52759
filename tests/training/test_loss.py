import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SMALL_CONFIG
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lata_lightning.evaluation import logits
from lata_lightning.training import loss as losses
from lata_lightning.training.loss import chunked_loss, is_wide


def batch():
    ids = torch.randint(3, 61, (3, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 5:] = -100, -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "tied", "gemma2", "lora"])
def test_loss_and_gradients_are_those_of_the_whole_model(kind, monkeypatch):
    monkeypatch.setattr(logits, "BYTES_AT_ONCE", 4 * 61 * 4)
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL_CONFIG, final_logit_softcapping=2.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL_CONFIG, tie_word_embeddings=kind == "tied"))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.train()
    given = batch()
    found = []
    for loss in (model(**given).loss, chunked_loss(model, given)):
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert len(found[0][1]) == len(found[1][1])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_only_wide_batches_of_models_with_the_usual_loss_are_taken_apart(monkeypatch):
    model, given = LlamaForCausalLM(LlamaConfig(**SMALL_CONFIG)), batch()
    assert not is_wide(model, given)
    monkeypatch.setattr(losses, "WIDE", 27 * 61 * 4 - 1)
    assert is_wide(model, given)
    assert not is_wide(torch.nn.Linear(1, 1), given)
    assert not is_wide(MixtralForCausalLM(MixtralConfig(**SMALL_CONFIG, num_local_experts=2, output_router_logits=True)), given)
