"""The rows of the comparison on small vectors in memory: sums, TIES, DARE and MagMax against peft and numpy, and the search of coefficients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lata_lightning.vectors.task_vector import TaskVector
from study.real.rows import ROWS, Merge, combined, largest, rows_for, summed

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight")


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 4, generator=generator) for name in NAMES}


@pytest.fixture
def start():
    return weights(0)


@pytest.fixture
def vectors(start):
    return [TaskVector.between(start, weights(seed)) for seed in (1, 2, 3)]


def merge_of(vectors, score=lambda _: 0.0, trials=8, seed=0):
    return Merge("plain", seed, None, None, vectors, None, list, score, trials)


def test_a_sum_is_the_sum_of_numpy_rounded_once(vectors):
    found = summed(vectors)
    for name in NAMES:
        expected = sum(vector[name].numpy().astype(np.float64) for vector in vectors).astype(np.float32)
        assert np.array_equal(found[name].numpy(), expected)


def test_magmax_takes_the_largest_magnitude_with_its_sign(vectors):
    stacked = np.stack([vector[NAMES[0]].numpy() for vector in vectors])
    expected = np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]
    assert np.array_equal(largest(vectors)[NAMES[0]].numpy(), expected)


def test_ties_is_that_of_peft_tensor_by_tensor(vectors):
    found = rows_for("plain")["TIES 0.2"].build(merge_of(vectors))
    for name in NAMES:
        expected = merge_utils.ties([vector[name] for vector in vectors], torch.ones(3), 0.2)
        assert torch.equal(found[name], expected)


def test_dare_drops_the_same_entries_whenever_it_is_read_and_others_for_another_seed(vectors):
    row = rows_for("plain")["DARE 0.5"]
    found = row.build(merge_of(vectors))
    assert torch.equal(found[NAMES[0]], found[NAMES[0]])
    assert not torch.equal(found[NAMES[0]], row.build(merge_of(vectors, seed=1))[NAMES[0]])


def test_reading_dare_leaves_the_generator_of_torch_alone(vectors):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rows_for("plain")["DARE 0.5"].build(merge_of(vectors))[NAMES[0]]
    assert torch.equal(torch.rand(2), expected)


def test_a_combined_vector_records_what_it_was_made_of(vectors):
    made = combined("mine", vectors, lambda tensors, name: tensors[0])
    assert made.manifest.derivation.name == "mine"
    assert len(made.manifest.derivation.inputs) == 3
    assert made.manifest.tuned_identity.content_hash is None


def test_blocks_only_leaves_out_what_belongs_to_no_block(vectors):
    found = rows_for("plain")["blocks only"].build(merge_of(vectors))
    assert not found["lm_head.weight"].any()
    assert torch.equal(found[NAMES[1]], summed(vectors)[NAMES[1]])


def test_random_ranks_give_the_layers_the_coefficients_of_the_linear_rule(vectors):
    found = rows_for("plain")["random linear 1"].build(merge_of(vectors[:1]))
    shares = sorted(float((found[name] / vectors[0][name]).mean()) for name in NAMES[:2])
    assert shares == pytest.approx([0.5, 1.0])


def test_the_search_of_coefficients_returns_the_best_that_it_has_scored(vectors):
    scores = {}

    def score(weighted):
        # Better the nearer the sum is to one vector: the second.
        total = sum(vector.pure()[NAMES[0]] for vector in weighted)
        value = -float((total - vectors[1][NAMES[0]]).norm())
        scores[value] = total
        return value

    found = rows_for("plain")["few-shot from uniform"].build(merge_of(vectors, score, trials=12))
    assert len(scores) == 12
    assert torch.allclose(found[NAMES[0]], scores[max(scores)], atol=1e-5)


def test_without_an_instruction_vector_there_is_no_row_that_ranks_by_alignment():
    assert not [name for name in rows_for("plain") if name.startswith(("LATA", "by relative", "reversed"))]
    assert {"LATA linear, block", "LATA log, block", "LATA threshold, block"} <= set(rows_for("instruct"))


def test_only_experts_from_base_have_anchored_rows():
    anchored = {row.name for row in ROWS if "anchored" in row.name}
    assert anchored <= set(rows_for("base"))
    assert not anchored & (set(rows_for("plain")) | set(rows_for("instruct")))


def test_experts_from_base_are_anchored_by_taking_the_instruction_vector_off(start):
    instruct, expert = weights(8), weights(9)
    vector = TaskVector.between(start, expert, start_kind="base")
    merge = replace(merge_of([vector]), protocol="base", instruction=TaskVector.between(start, instruct, kind="instruction"))
    assert torch.allclose(merge.anchored[0][NAMES[0]], expert[NAMES[0]] - instruct[NAMES[0]], atol=1e-6)
    found = rows_for("base")["LATA linear, block"].build(merge)
    ratios = sorted(float((found[name] / merge.anchored[0][name]).median()) for name in NAMES[:2])
    assert ratios == pytest.approx([0.5, 1.0], abs=1e-4)
