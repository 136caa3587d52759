import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SMALL_CONFIG
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lata_lightning.evaluation import logits
from lata_lightning.evaluation.logits import body_and_head, positions_at_once, token_scores


def without(*names):
    return {name: value for name, value in SMALL_CONFIG.items() if name not in names}


KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL_CONFIG)),
    "gemma2 with a soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL_CONFIG, final_logit_softcapping=2.0)),
    "cohere with a scale": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL_CONFIG, logit_scale=0.3)),
    "granite with a scale": lambda: GraniteForCausalLM(GraniteConfig(**without("head_dim"), logits_scaling=3.0)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL_CONFIG, num_local_experts=2, num_experts_per_tok=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)
    ),
}


@pytest.fixture(params=sorted(KINDS))
def model(request):
    return KINDS[request.param]().eval()


def batch():
    ids = torch.randint(3, 61, (3, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 5:], labels[2] = -100, -100, -100
    return ids, labels


@torch.no_grad()
def test_scores_are_those_of_all_logits_whatever_comes_after_the_body(model, monkeypatch):
    ids, labels = batch()
    whole = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    rows, positions = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    wanted = labels[:, 1:][rows, positions]
    expected = -whole[rows, positions, wanted].double()
    for size in (4, 10**9):
        monkeypatch.setattr(logits, "BYTES_AT_ONCE", size * 61)
        found = token_scores(model, ids, labels)
        torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.hits, whole[rows, positions].argmax(-1) == wanted)
        assert torch.equal(found.rows, rows)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_a_model_with_lora_is_scored_with_its_adapters():
    inside = KINDS["llama"]()
    model = get_peft_model(inside, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    ids, labels = batch()
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    assert body_and_head(model, input_ids=ids) is not None
    assert token_scores(model, ids, labels).losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_a_module_that_only_gives_logits_is_scored_too():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(61, 61)

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": self.table(input_ids)})

    ids, labels = batch()
    model = Plain()
    assert body_and_head(model, input_ids=ids) is None
    expected = torch.nn.functional.cross_entropy(model.table(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert token_scores(model, ids, labels).losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_the_model_is_itself_again_also_when_the_head_fails():
    model = KINDS["llama"]().eval()
    ids, labels = batch()
    before = model(input_ids=ids).logits
    head = body_and_head(model, input_ids=ids)
    with pytest.raises(RuntimeError):
        head.logits(torch.zeros(2, 5))
    assert "forward" not in vars(model.model)
    assert torch.equal(model(input_ids=ids).logits, before)
    token_scores(model, ids, labels)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_nothing_to_score_gives_nothing():
    ids, labels = batch()
    with torch.no_grad():
        assert len(token_scores(KINDS["llama"]().eval(), ids, torch.full_like(labels, -100)).losses) == 0


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        # Views of the weights, such as a transposed head, are no new memory.
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        stores = [leaf.untyped_storage() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *(store.nbytes() for store in stores if store.data_ptr() not in given)])
        return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_wide_vocabulary_takes_no_more_memory_than_a_chunk_of_logits(tied):
    width = 2**18
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL_CONFIG, "vocab_size": width, "hidden_size": 8}, tie_word_embeddings=tied)).eval()
    ids = torch.randint(3, width, (4, 256))
    with torch.inference_mode(), Largest() as largest:
        found = token_scores(model, ids, ids)
    assert len(found.losses) == 4 * 255
    # All logits would be 1 GiB; one position is 1 MiB, and those of the last positions of the four rows 4 MiB.
    assert largest.bytes <= 2**25
    assert positions_at_once(width) == 32
    assert math.exp(found.losses.mean()) > 1000
