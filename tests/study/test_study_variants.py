"""The variants of the merge without samples: what each changes, and that nothing else does."""

import pytest
import torch
from test_study_rules import made

from study import merging, variants
from study.cases import summed
from study.rules import WITHOUT_SAMPLES
from study.variants import VARIANTS


@pytest.fixture(scope="module")
def case():
    return made("instruct")


@pytest.fixture(scope="module")
def plain(case):
    return VARIANTS[WITHOUT_SAMPLES].build(case)


def differing(one, other):
    return {name for name in one if not torch.allclose(one[name], other[name], rtol=0, atol=1e-6)}


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("embeddings and head: mean", lambda name, tensor: name in ("model.embed_tokens.weight", "lm_head.weight")),
        ("embeddings and head: sum", lambda name, tensor: name in ("model.embed_tokens.weight", "lm_head.weight")),
        ("biases and norms: sum", lambda name, tensor: tensor.ndim == 1),
        ("q, k, v and gate, up joined", lambda name, tensor: any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_", "up_"))),
        ("ridge 3", lambda name, tensor: tensor.ndim == 2),
        ("prior mean", lambda name, tensor: tensor.ndim == 2),
    ],
)
def test_a_variant_changes_the_tensors_that_it_names_and_no_others(case, plain, variant, names):
    changed = differing(VARIANTS[variant].build(case), plain)
    assert changed == {name for name, tensor in plain.items() if names(name, tensor)} != set()


def test_plain_embeddings_are_the_sum_or_the_mean_of_the_vectors(case):
    total = sum(vector["lm_head.weight"].double() for vector in case.vectors)
    assert torch.allclose(VARIANTS["embeddings and head: sum"].build(case)["lm_head.weight"].double(), total, atol=1e-6)
    assert torch.allclose(VARIANTS["embeddings and head: mean"].build(case)["lm_head.weight"].double(), total / 3, atol=1e-6)


def test_every_matrix_of_the_variant_of_same_norm_has_the_norm_of_the_sum(case):
    total = summed(case.vectors)
    for name, tensor in VARIANTS["norm of the sum"].build(case).items():
        if tensor.ndim == 2:
            assert tensor.norm().item() == pytest.approx(total[name].norm().item(), rel=1e-5)


def test_a_run_gives_the_scores_of_every_variant_at_scale_one(monkeypatch):
    class Chain:
        seed = 100

    def run(chain, setting, scales, methods):
        row = {"validation": {"0": 0.1, "1": 0.2}, "untuned": 0.3}
        return {"methods": dict.fromkeys(methods, row), "cpu_minutes": {"evaluation": 2.0}}

    monkeypatch.setattr(merging, "run", run)
    found = variants.run(Chain())
    assert "text-base-wikitext2+gsm8k+mbpp" not in found["settings"]
    assert len(found["settings"]) == 5
    assert found["settings"]["text-base-wikitext2+gsm8k"]["prior mean"] == {"validation": 0.2, "test": 0.3}
    assert found["cpu_minutes"] == 10
