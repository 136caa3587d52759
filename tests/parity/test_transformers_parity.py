"""Extract, merge and forget beside arithmetic by hand on what transformers loads, for every architecture, tied or not, in two precisions."""

from functools import cache
from math import sin

import pytest
import torch
from architectures import ARCHITECTURES, both_precisions, every_architecture, loaded, outputs_of
from exact_sums import SCALES, assert_as_near_as_can_be, assert_no_further, exact_sum, nearest
from tiny_models import read_back, same_bits

from lata_lightning import TaskVector, Term, align, forget, merge


@pytest.fixture(scope="module")
def merged(tmp_path_factory, family):
    """A function that gives the directory of our merge of both tuned models of a variant, made once."""

    @cache
    def directory(name, tied, dtype):
        models = family(name, tied, dtype)
        terms = [Term(TaskVector.between(models["start"], models[label]), scale) for label, scale in SCALES.items()]
        return merge(models["start"], terms, tmp_path_factory.mktemp(name) / "merged")

    return directory


def summed(name, models, convert):
    """Start + Σ scale · (tuned − start) on the state dicts of the loaded models, their tensors converted first."""
    start, *tuned = (loaded(name, models[label]).state_dict() for label in ("start", *SCALES))
    found = {}
    for key, tensor in start.items():
        origin = convert(tensor)
        found[key] = origin + sum(scale * (convert(end[key]) - origin) for scale, end in zip(SCALES.values(), tuned, strict=True))
    return found


def ties_of(model):
    """Groups of names under which a model holds one and the same parameter."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


@every_architecture
@both_precisions
def test_a_merge_is_no_further_from_the_exact_sum_than_arithmetic_on_state_dicts(tmp_path, family, merged, name, tied, dtype):
    models = family(name, tied, dtype)
    by_hand = loaded(name, models["start"])
    by_hand.load_state_dict(summed(name, models, lambda tensor: tensor))
    by_hand.save_pretrained(tmp_path / "theirs")
    ours = read_back(merged(name, tied, dtype))
    exact = exact_sum(models["start"], *((models["start"], models[label], scale) for label, scale in SCALES.items()))
    assert_as_near_as_can_be(ours, exact, dtype)
    assert_no_further(ours, read_back(tmp_path / "theirs"), exact)


@every_architecture
@both_precisions
def test_a_merged_model_loads_complete_stays_tied_and_answers_as_the_exact_weights_do(family, merged, name, tied, dtype):
    models = family(name, tied, dtype)
    model, report = loaded(name, merged(name, tied, dtype), output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Names of modules, where files have names of checkpoints: nothing here went through the code under test.
    start, expected = loaded(name, models["start"]), loaded(name, models["start"])
    expected.load_state_dict({key: nearest(tensor, dtype) for key, tensor in summed(name, models, torch.Tensor.double).items()})
    assert ties_of(model) == ties_of(start)
    if ARCHITECTURES[name].ties:
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    answer = outputs_of(name, model)
    assert not torch.allclose(answer, outputs_of(name, start), rtol=1e-2, atol=1e-2)
    if dtype == torch.bfloat16:
        assert torch.equal(answer, outputs_of(name, expected))
    else:
        torch.testing.assert_close(answer, outputs_of(name, expected))


@every_architecture
@both_precisions
def test_forgetting_takes_off_what_merging_adds_layer_by_layer(tmp_path, family, name, tied, dtype):
    models = family(name, tied, dtype)
    vector = TaskVector.between(models["start"], models["tuned-1"])
    instruction = TaskVector.between(models["base"], models["start"], kind="instruction")
    vector = vector.weighted(align(vector, instruction), "linear", outside=0.6)
    by_block = vector.manifest.coefficients
    assert len(set(by_block.values())) == len(by_block) > 1
    coefficients = {
        key: sin(0.8) * next((value for block, value in by_block.items() if key.startswith(f"{block}.")), 0.6)
        for key in read_back(models["start"])
    }
    added = merge(models["tuned-2"], [Term(vector, sin(0.8))], tmp_path / "added")
    taken = forget(models["tuned-2"], Term(vector, sin(0.8)), tmp_path / "taken")
    for output, sign in ((added, 1), (taken, -1)):
        signed = {key: sign * value for key, value in coefficients.items()}
        assert_as_near_as_can_be(read_back(output), exact_sum(models["tuned-2"], (models["start"], models["tuned-1"], signed)), dtype)


@every_architecture
@both_precisions
def test_an_extracted_vector_is_the_difference_of_the_files_and_of_the_modules(tmp_path, family, name, tied, dtype):
    models = family(name, tied, dtype)
    vector = TaskVector.between(models["start"], models["tuned-1"])
    saved = vector.save(tmp_path / "vector")
    begin, end = read_back(models["start"]), read_back(models["tuned-1"])
    expected = {key: (end[key].double() - begin[key].double()).float() for key in begin}
    assert same_bits(dict(vector), expected)
    assert same_bits(dict(saved), expected)
    assert same_bits(dict(TaskVector.between(loaded(name, models["start"]), loaded(name, models["tuned-1"]))), expected)
    outputs = [merge(models["start"], [Term(side, 0.6)], tmp_path / str(index)) for index, side in enumerate((vector, saved))]
    assert same_bits(*(read_back(output) for output in outputs))
