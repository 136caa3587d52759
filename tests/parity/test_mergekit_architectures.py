"""Layer-weighted merges beside those of mergekit, in memory and from directory to directory, for every architecture, tied or not, in two precisions."""

from math import sin

import pytest
import torch
from architectures import both_precisions, every_architecture, loaded, outputs_of
from exact_sums import SCALES, assert_as_near_as_can_be, assert_no_further, exact_sum
from tiny_models import read_back

from lata_lightning import TaskVector, Term, align, forget, merge

mergekit_methods = pytest.importorskip("mergekit.merge_methods")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
# Its tables of architectures ask for tensors that no release of transformers still saves (GPT-NeoX), or that models with this head do not have (BERT).
REFUSED = {"gpt_neox": "attention.masked_bias required but not present", "bert": "pooler.dense.weight required but not present"}


def weighted_terms(models, level):
    """Our terms with layer coefficients, and the factor of every tensor by tuned model."""
    instruction = TaskVector.between(models["base"], models["start"], kind="instruction")
    terms, factors = [], {}
    for label, scale in SCALES.items():
        vector = TaskVector.between(models["start"], models[label])
        vector = vector.weighted(align(vector, instruction, level), "linear", outside=0.5)
        terms.append(Term(vector, scale))
        factors[label] = {name: scale * vector.coefficient_of(name) for name in vector}
    return terms, factors


def in_memory(sides, factors, **precision):
    """Task arithmetic by mergekit on the first of several sets of tensors, with one weight for each other set and tensor."""
    onto, *others = sides
    per_tensor = [{label: factors[label][name] for label in others} for name in sides[onto]]
    return mergekit_methods.merge_state_dicts(
        sides,
        "task_arithmetic",
        base=onto,
        parameters={"weight": mergekit_methods.PerGroupValues(per_tensor), "normalize": False, "lambda": 1.0},
        **precision,
    )


def from_directories(models, terms, dtype, output):
    """Task arithmetic by mergekit from directory to directory, with a filter for every block and a last value for what is outside of them."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    entries = []
    for label, term in zip(SCALES, terms, strict=True):
        manifest = term.vector.manifest
        weights = [{"filter": f"{block}.", "value": term.scale * value} for block, value in manifest.coefficients.items()]
        entries.append({"model": str(models[label]), "parameters": {"weight": [*weights, {"value": term.scale * manifest.outside}]}})
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(models["start"]),
        "dtype": str(dtype).removeprefix("torch."),
        "models": entries,
    }
    run_merge(
        MergeConfiguration.model_validate(config),
        out_path=str(output),
        options=MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"),
    )
    return output


@every_architecture
@both_precisions
def test_in_memory_no_merge_is_further_from_the_exact_answer_than_that_of_mergekit(tmp_path, family, name, tied, dtype):
    models = family(name, tied, dtype)
    terms, factors = weighted_terms(models, "tensor")
    ours = read_back(merge(models["start"], terms, tmp_path / "ours"))
    sides = {label: read_back(models[label]) for label in ("start", *factors)}
    exact = exact_sum(models["start"], *((models["start"], models[label], by_name) for label, by_name in factors.items()))
    assert_as_near_as_can_be(ours, exact, dtype)
    assert_no_further(ours, in_memory(sides, factors), exact)
    # Sums in float32 are the best that mergekit can be told to form for half precisions, and still are rounded more than once.
    assert_no_further(ours, in_memory(sides, factors, dtype=torch.float32, out_dtype=dtype), exact)


@every_architecture
@both_precisions
def test_forgetting_is_no_further_from_the_exact_answer_than_a_negative_weight_of_mergekit(tmp_path, family, name, tied, dtype):
    models = family(name, tied, dtype)
    vector = TaskVector.between(models["start"], models["tuned-1"])
    instruction = TaskVector.between(models["base"], models["start"], kind="instruction")
    vector = vector.weighted(align(vector, instruction, "submodule"), "log", outside=0.5)
    ours = read_back(forget(models["tuned-2"], Term(vector, sin(0.8)), tmp_path / "ours"))
    factors = {"tuned-1": {key: -sin(0.8) * vector.coefficient_of(key) for key in vector}, "tuned-2": dict.fromkeys(vector, 1.0)}
    # mergekit counts from one base: the target is a term of its own.
    theirs = in_memory({label: read_back(models[label]) for label in ("start", "tuned-1", "tuned-2")}, factors)
    exact = exact_sum(models["tuned-2"], (models["start"], models["tuned-1"], factors["tuned-1"]))
    assert_no_further(ours, theirs, exact)


@every_architecture
@both_precisions
def test_from_directories_no_merge_is_further_from_the_exact_answer_than_that_of_mergekit(tmp_path, family, name, tied, dtype):
    models = family(name, tied, dtype)
    terms, factors = weighted_terms(models, "block")
    ours = merge(models["start"], terms, tmp_path / "ours")
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[name]) as refusal:
            from_directories(models, terms, dtype, tmp_path / "theirs")
        pytest.skip(f"mergekit: {refusal.value}")
    theirs = from_directories(models, terms, dtype, tmp_path / "theirs")
    model, report = loaded(name, theirs, output_loading_info=True)
    if name == "vit":
        assert report["missing_keys"]
        pytest.skip(f"mergekit leaves out {len(report['missing_keys'])} tensors of the blocks without a word")
    # Experts are fused in what mergekit writes, and transformers would keep them so: a model of the first layout takes them over.
    renamed = loaded(name, models["start"])
    renamed.load_state_dict(model.state_dict())
    renamed.save_pretrained(tmp_path / "renamed")
    exact = exact_sum(models["start"], *((models["start"], models[label], by_name) for label, by_name in factors.items()))
    assert_no_further(read_back(ours), read_back(tmp_path / "renamed"), exact)
    one, other = (outputs_of(name, found) for found in (loaded(name, ours), model))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
