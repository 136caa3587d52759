"""Our merge beside mergekit's task arithmetic, on the same inputs, both measured against exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from tiny_models import BLOCKS, llama, plus, read_back, weights

from lata_lightning.merging.merge import Term, merge
from lata_lightning.vectors.aligning import align
from lata_lightning.vectors.task_vector import TaskVector

mergekit_methods = pytest.importorskip("mergekit.merge_methods")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def by_mergekit(start, tuned, coefficients):
    """Task arithmetic by mergekit, with one coefficient for each tuned model and tensor."""
    names = [f"tuned {index}" for index in range(len(tuned))]
    per_tensor = [dict(zip(names, (coefficient[name] for coefficient in coefficients), strict=True)) for name in start]
    return mergekit_methods.merge_state_dicts(
        {"start": start, **dict(zip(names, tuned, strict=True))},
        "task_arithmetic",
        base="start",
        parameters={"weight": mergekit_methods.PerGroupValues(per_tensor), "normalize": False, "lambda": 1.0},
    )


def exact_errors(found, start, tuned, coefficients):
    """|found − exact answer| entry by entry as float64; the answer is computed in rational numbers."""
    errors = {}
    for name in start:
        sides = [side[name].double().reshape(-1).tolist() for side in (found, start, *tuned)]
        factors = [Fraction(coefficient[name]) for coefficient in coefficients]
        errors[name] = torch.zeros(len(sides[0]), dtype=torch.float64)
        for entry, (result, origin, *ends) in enumerate(zip(*sides, strict=True)):
            update = sum(factor * (Fraction(end) - Fraction(origin)) for factor, end in zip(factors, ends, strict=True))
            errors[name][entry] = float(abs(Fraction(result) - Fraction(origin) - update))
    return errors


def held(start, tuned):
    """Where float32 holds every difference exactly, by tensor; decided in float64."""
    found = {}
    for name, origin in start.items():
        exact = [model[name].double() - origin.double() for model in tuned]
        found[name] = torch.stack([difference.float().double() == difference for difference in exact]).all(dim=0).reshape(-1)
    return found


def setting(dtype):
    start = weights(0, width=12, dtype=dtype)
    tuned = [plus(start, weights(seed, width=12), 0.05) for seed in (1, 2)]
    instruction = TaskVector.between(weights(5, width=12), weights(6, width=12), kind="instruction")
    terms, coefficients = [], []
    for model, scale in zip(tuned, (0.37, 0.8), strict=True):
        task = TaskVector.between(start, model)
        task = task.weighted(align(task, instruction, "tensor"), "log", outside=0.5)
        terms.append(Term(task, scale))
        coefficients.append({name: scale * task.coefficient_of(name) for name in start})
    assert len({value for coefficient in coefficients for value in coefficient.values()}) > 6
    return start, tuned, terms, coefficients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_half_precision_entry_is_further_from_the_exact_answer_than_that_of_mergekit(tmp_path, dtype):
    # Here float32 holds every difference, so ours is the nearest number there is.
    start, tuned, terms, coefficients = setting(dtype)
    assert all(exact.all() for exact in held(start, tuned).values())
    merge(start, terms, tmp_path / "out")
    ours = exact_errors(read_back(tmp_path / "out"), start, tuned, coefficients)
    theirs = exact_errors(by_mergekit(start, tuned, coefficients), start, tuned, coefficients)
    for name in start:
        assert (ours[name] <= theirs[name]).all(), name
    assert any((ours[name] < theirs[name]).any() for name in start)


def test_float32_results_are_closer_to_the_exact_answer_than_those_of_mergekit(tmp_path):
    start, tuned, terms, coefficients = setting(torch.float32)
    merge(start, terms, tmp_path / "out")
    ours = exact_errors(read_back(tmp_path / "out"), start, tuned, coefficients)
    theirs = exact_errors(by_mergekit(start, tuned, coefficients), start, tuned, coefficients)
    for name in start:
        assert ours[name].max() <= theirs[name].max(), name
        assert ours[name].sum() <= theirs[name].sum(), name
        assert (ours[name] <= theirs[name])[held(start, tuned)[name]].all(), name


def test_coefficients_of_one_agree_with_mergekit_to_the_last_bit_where_nothing_is_rounded(tmp_path):
    start = weights(0, step=2**-8)
    tuned = [plus(start, weights(seed, step=2**-8, spread=0.1)) for seed in (1, 2)]
    merge(start, [Term(TaskVector.between(start, model)) for model in tuned], tmp_path / "out")
    ours, theirs = read_back(tmp_path / "out"), by_mergekit(start, tuned, [dict.fromkeys(start, 1.0)] * 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in start)


def test_block_coefficients_give_what_mergekit_makes_of_a_list_of_layer_weights(tmp_path):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    for name, seed in (("start", 0), ("tuned", 1), ("base", 2)):
        llama(seed).save_pretrained(tmp_path / name)
    task = TaskVector.between(tmp_path / "start", tmp_path / "tuned")
    instruction = TaskVector.between(tmp_path / "base", tmp_path / "start", kind="instruction")
    task = task.weighted(align(task, instruction), "linear")
    merge(tmp_path / "start", [Term(task, 0.5)], tmp_path / "ours")

    values = [0.5 * task.manifest.coefficients[block] for block in BLOCKS]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "start"),
        "dtype": "float32",
        "models": [
            {
                "model": str(tmp_path / "tuned"),
                "parameters": {
                    "weight": [
                        *({"filter": f"model.layers.{index}.", "value": value} for index, value in enumerate(values)),
                        {"value": 0.0},
                    ]
                },
            }
        ],
    }
    run_merge(
        MergeConfiguration.model_validate(config),
        out_path=str(tmp_path / "theirs"),
        options=MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"),
    )
    ours, theirs = read_back(tmp_path / "ours"), read_back(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    start = read_back(tmp_path / "start")
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=2**-22), name
        if not name.startswith("model.layers."):
            assert torch.equal(ours[name], start[name]), name
