"""One vector from the vectors alone, for whole models, beside numpy and beside peft."""

import json
import math
from functools import cache

import numpy as np
import peft
import pytest
import torch
from architectures import ARCHITECTURES, every_architecture, loaded, moved, save_family, tiny_model
from passed_warnings import GRADIENT_CHECKPOINTING
from tiny_models import BLOCKS, plus, read_back, same_bits, weights, write_model
from transformers.pytorch_utils import Conv1D

from lata_lightning import TaskVector, Term, merge, regress
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError
from lata_lightning.exports.peft import export_peft
from lata_lightning.linearity.from_vectors import merge_matrices
from lata_lightning.numerics.singular import iso_c, tsv_m
from lata_lightning.vectors.artefact import verify
from lata_lightning.vectors.provenance import OUTSIDE

# peft and transformers warn of what they rename and of settings that are of no account here.
pytestmark = GRADIENT_CHECKPOINTING
START = weights(0)
TUNED = [plus(START, weights(seed), 0.1) for seed in (1, 2)]
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gemma2": ["v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value"],
    "bert": ["query", "dense"],
    "bert_classifier": ["query"],
    "t5": ["q", "wo"],
    "bart": ["q_proj", "fc1"],
    "vit": ["q_proj", "fc1"],
    "clip_vision": ["q_proj", "fc2"],
    "mixtral": ["o_proj"],
    "qwen3_moe": ["k_proj"],
}


def by_numpy(matrices, ridge=1.0):
    """The formula as it stands, for matrices of outputs × inputs of which at least two are not zero."""
    grams = [matrix.T @ matrix for matrix in matrices]
    total = sum(grams)
    penalty = ridge * np.mean(np.diag(total))
    products = sum(matrix @ gram for matrix, gram in zip(matrices, grams, strict=True))
    return (products + penalty * sum(matrices)) @ np.linalg.inv(total + penalty * np.eye(len(total)))


def deltas_of(vectors, name):
    return [vector[name].double().numpy() for vector in vectors]


def expected_of(deltas, *, turned=False):
    """A tensor of the regression: what is no matrix, or has outputs with inputs of their own, is the mean of the vectors that change it."""
    shape = deltas[0].shape
    acting = [delta for delta in deltas if delta.any()]
    if len(acting) < 2:
        return acting[0] if acting else deltas[0]
    if len(shape) == 2:
        return by_numpy([delta.T for delta in acting]).T if turned else by_numpy(acting)
    if len(shape) == 4 and 1 not in shape[:2]:
        return by_numpy([delta.reshape(shape[0], -1) for delta in acting]).reshape(shape)
    return sum(acting) / len(acting)


def turned_names(name):
    """Names of the weights that the modules of an architecture multiply from the left."""
    return {f"{path}.weight" for path, module in tiny_model(name).named_modules() if isinstance(module, Conv1D)}


def vectors_of(tuned=TUNED, start=START, **options):
    return [TaskVector.between(start, one, **options) for one in tuned]


@every_architecture
def test_dense_vectors_of_every_architecture_equal_numpy_on_their_files(name, tied, tmp_path):
    models = save_family(tmp_path, name, tied=tied)
    start, tuned = read_back(models["start"]), [read_back(models[f"tuned-{number}"]) for number in (1, 2)]
    found = regress([TaskVector.between(models["start"], models[f"tuned-{number}"]) for number in (1, 2)])
    assert set(found) == set(start)
    turned = turned_names(name)
    for key, tensor in start.items():
        deltas = [(other[key] - tensor).double().numpy() for other in tuned]
        expected = expected_of(deltas, turned=key in turned)
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-5, atol=1e-7, err_msg=key)


def save_adapter(name, start, directory, seed, rank):
    """An adapter whose factors are noise, saved by peft."""
    config = peft.LoraConfig(r=rank, lora_alpha=5, fan_in_fan_out=name == "gpt2", target_modules=TARGETS[name])
    wrapped = peft.get_peft_model(loaded(name, start), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A function from an architecture to a start and two adapters on it, of rank 2 and 3."""

    @cache
    def saved(name):
        directory = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(directory / "start")
        return directory / "start", [save_adapter(name, directory / "start", directory / f"adapter-{rank}", rank, rank) for rank in (2, 3)]

    return saved


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_of_every_architecture_equal_numpy_and_stay_factors(name, adapted, tmp_path):
    start, adapters = adapted(name)
    vectors = [TaskVector.between(start, adapter) for adapter in adapters]
    found = regress(vectors).save(tmp_path / "one")
    verify(tmp_path / "one")
    changed = {key for key in found if key not in found.unchanged}
    assert changed
    turned = turned_names(name)
    for key in changed:
        expected = expected_of(deltas_of(vectors, key), turned=key in turned)
        factors = found.low_rank(key)
        assert factors is not None
        assert factors.rank <= 5
        np.testing.assert_allclose(factors.dense(torch.float64).numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=key)
    assert found.unchanged == vectors[0].unchanged & vectors[1].unchanged


def test_peft_loads_the_regression_of_adapters_as_one_exact_adapter(adapted, tmp_path):
    start, adapters = adapted("llama")
    found = regress([TaskVector.between(start, adapter) for adapter in adapters]).save(tmp_path / "one")
    merged = read_back(merge(start, [Term(found)], tmp_path / "merged"))
    export_peft([Term(found)], tmp_path / "adapter", onto=start)
    model = peft.PeftModel.from_pretrained(loaded("llama", start), tmp_path / "adapter").merge_and_unload()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 5
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=1e-6)


def test_an_adapter_beside_a_full_fine_tune_counts_as_its_product(adapted):
    start, adapters = adapted("llama")
    full = moved(loaded("llama", start), seed=5)
    vectors = [TaskVector.between(start, adapters[0]), TaskVector.between(start, full)]
    found = regress(vectors)
    for key in found:
        np.testing.assert_allclose(found[key].numpy(), expected_of(deltas_of(vectors, key)), rtol=1e-5, atol=1e-6, err_msg=key)
        assert found.low_rank(key) is None


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_are_solved_one_by_one(turned):
    generator = torch.Generator().manual_seed(0)
    prefix = "model.layers.0.mlp.experts."
    shapes = {f"{prefix}gate_up_proj": (3, 8, 5), f"{prefix}down_proj": (3, 5, 4), "model.layers.0.self_attn.q_proj.weight": (5, 5)}
    if turned:
        shapes = {name: (shape[0], *shape[:0:-1]) if len(shape) == 3 else shape for name, shape in shapes.items()}
    models = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]
    vectors = vectors_of(models[1:], models[0])
    found = regress(vectors)
    for name in (f"{prefix}gate_up_proj", f"{prefix}down_proj"):
        one, other = deltas_of(vectors, name)
        for expert in range(3):
            pair = [one[expert].T, other[expert].T] if turned else [one[expert], other[expert]]
            expected = by_numpy(pair).T if turned else by_numpy(pair)
            np.testing.assert_allclose(found[name][expert].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "function"), [("tsv", tsv_m), ("iso", iso_c)])
def test_merges_by_singular_vectors_take_the_matrices_of_the_blocks_and_the_mean_of_the_rest(method, function):
    vectors = vectors_of()
    found = merge_matrices(vectors, method)
    for name in found:
        held = [vector[name].double() for vector in vectors]
        inside = name.startswith(BLOCKS) and held[0].ndim == 2
        expected = function(held) if inside else sum(held) / 2
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert set(found.manifest.derivation.averaged) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.manifest.derivation.name == method


@pytest.mark.parametrize("method", ["regression", "tsv", "iso"])
def test_threads_shards_and_chunks_change_no_bit(method, tmp_path):
    vectors = vectors_of()
    found = merge_matrices(vectors, method)
    found.save(tmp_path / "one", workers=1)
    merge_matrices(vectors, method).save(tmp_path / "other", workers=3, max_shard_bytes=200)
    assert same_bits(read_back(tmp_path / "one"), read_back(tmp_path / "other"))
    assert all(torch.equal(found[name], tensor) for name, tensor in read_back(tmp_path / "one").items())


def test_the_order_of_the_vectors_changes_nothing_but_rounding():
    vectors = vectors_of()
    one, other = regress(vectors), regress(vectors[::-1])
    assert all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in one)


def test_one_vector_comes_out_bit_for_bit():
    (vector,) = vectors_of(TUNED[:1])
    found = regress([vector])
    assert all(torch.equal(found[name], vector[name]) for name in vector)


def test_a_vector_that_leaves_a_tensor_alone_has_no_say_in_it():
    name, norm = f"{BLOCKS[0]}.mlp.up_proj.weight", "model.norm.weight"
    still = {**TUNED[1], name: START[name], norm: START[norm]}
    vectors = vectors_of([TUNED[0], still])
    found = regress(vectors)
    torch.testing.assert_close(found[name], vectors[0][name], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[norm], vectors[0][norm], rtol=1e-6, atol=0)


def test_interference_is_reported_by_layer_and_vector_as_numpy_finds_it(tmp_path):
    models = [write_model(tmp_path / name, tensors) for name, tensors in (("start", START), ("math", TUNED[0]), ("text", TUNED[1]))]
    vectors = [TaskVector.between(models[0], model) for model in models[1:]]
    found = regress(vectors).save(tmp_path / "one")
    *interference, condition = found.manifest.derivation.measured
    assert [(entry.name, entry.vector) for entry in interference] == [("interference", vector.label) for vector in vectors]
    groups = {block: [name for name in found if name.startswith(block)] for block in BLOCKS}
    groups[OUTSIDE] = [name for name in found if not name.startswith(BLOCKS)]
    for number, entry in enumerate(interference):
        assert set(entry.layers) == set(groups)
        for layer, names in groups.items():
            lost = own = 0.0
            for name in names:
                taus = deltas_of(vectors, name)
                if taus[0].ndim == 2:
                    tau = taus[number]
                    lost += np.linalg.norm((by_numpy(taus) - tau) @ tau.T) ** 2
                    own += np.linalg.norm(tau @ tau.T) ** 2
            assert entry.layers[layer] == pytest.approx(math.sqrt(lost / own), rel=1e-5)
    assert condition.name == "condition"
    assert all(number > 1 for number in condition.layers.values())


def test_what_was_done_is_recorded(tmp_path):
    vectors = vectors_of()
    made = regress(vectors, ridge=0.5, prior="mean").save(tmp_path / "one").manifest
    assert (made.derivation.name, made.derivation.settings) == ("regression without samples", {"ridge": 0.5, "prior": "mean"})
    assert [entry.label for entry in made.derivation.inputs] == [vector.label for vector in vectors]
    assert made.derivation.averaged == ()
    assert TaskVector.open(tmp_path / "one").save(tmp_path / "copy").manifest.derivation == made.derivation


def test_the_prior_is_the_sum_unless_the_mean_is_asked_for():
    equal = vectors_of([TUNED[0], TUNED[0]])
    name = f"{BLOCKS[0]}.mlp.up_proj.weight"
    sums, means = (regress(equal, ridge=1e9, prior=prior)[name] for prior in ("sum", "mean"))
    torch.testing.assert_close(sums, 2 * equal[0][name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means, equal[0][name], rtol=1e-5, atol=1e-6)


def test_coefficients_do_not_count():
    plain = vectors_of()
    weighted = [vector.with_coefficients(dict.fromkeys(BLOCKS, 0.5)) for vector in plain]
    one, other = regress(plain), regress(weighted)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_from_base_make_a_vector_that_counts_from_base():
    found = regress(vectors_of(start_kind="base"))
    assert found.start == "base"
    assert regress(vectors_of()).start == "instruct"


def refused(error, match, vectors, **options):
    with pytest.raises(error, match=match):
        regress(vectors, **options)


def test_what_cannot_be_made_into_one_is_refused():
    vectors = vectors_of()
    refused(LataError, "give at least one vector", [])
    refused(LataError, "is an instruction vector", [vectors[0], TaskVector.between(START, TUNED[1], kind="instruction")])
    refused(LataError, "must count from one start: .* started from instruct, .* from base", [vectors[0], *vectors_of(start_kind="base")])
    refused(LayoutMismatchError, "same shapes", [vectors[0], TaskVector.between(weights(0, width=6), weights(1, width=6))])
    refused(LataError, "the ridge must be positive", vectors, ridge=0.0)
    refused(LataError, "unknown prior 'most'", vectors, prior="most")
    refused(LataError, "there can be no in_order, off_diagonal", vectors, in_order=True, off_diagonal=0.5)
    refused(LataError, "samples are run through the start model", vectors, samples=[[], []])
    refused(LataError, "cannot be solved on 'abacus' here", vectors, device="abacus")
    with pytest.raises(LataError, match="unknown method 'ties'; choose one of regression, tsv, iso"):
        merge_matrices(vectors, "ties")


def test_vectors_of_different_starts_are_refused_unless_it_is_switched_off(tmp_path):
    vectors = [
        TaskVector.between(write_model(tmp_path / f"start-{seed}", weights(seed)), write_model(tmp_path / f"tuned-{seed}", TUNED[0])).save(
            tmp_path / f"vector-{seed}"
        )
        for seed in (5, 6)
    ]
    refused(BaseMismatchError, "which are different weights", vectors)
    assert len(regress(vectors, check_base=False)) == len(START)


@pytest.mark.parametrize("method", ["regression", "tsv", "iso"])
def test_values_that_are_not_finite_are_refused_by_name_and_leave_nothing(method, tmp_path):
    name = f"{BLOCKS[1]}.self_attn.q_proj.weight"
    broken = {**TUNED[1], name: TUNED[1][name].clone().fill_(float("nan"))}
    with pytest.raises(CorruptFileError, match=f"{name}: NaN or infinite values in one of"):
        merge_matrices(vectors_of([TUNED[0], broken]), method).save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []
