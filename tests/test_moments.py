import numpy as np
import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.moments import Moments, check_start, total
from lata_lightning.numerics.measure import moments_table, tensor_sums


def test_an_unknown_start_is_refused_with_the_choices():
    with pytest.raises(LataError, match="unknown start 'raw'; choose one of instruct, base"):
        check_start("raw")
    with pytest.raises(LataError, match="unknown start"):
        tensor_sums(torch.zeros(2), start="raw")


def test_totals_add_every_sum_and_round_once():
    # Added one after the other, 1 would be lost beside 1e16 twice.
    rows = [Moments(1e16, 1.0, 2.0), Moments(1.0, 2.0, 3.0), Moments(1.0, 0.0, 0.0), Moments(-1e16, 4.0, 5.0)]
    assert total(rows) == Moments(2.0, 7.0, 10.0)
    assert total([]) == Moments(0.0, 0.0, 0.0)
    assert rows[1] + rows[2] == Moments(2.0, 2.0, 3.0)


def test_norms_are_roots_of_the_sums():
    moments = Moments(inner=0.0, task=9.0, instruction=4.0)
    assert (moments.task_norm, moments.instruction_norm, moments.relative_norm) == (3.0, 2.0, 1.5)
    assert Moments(0.0, 9.0, 0.0).relative_norm is None


def test_alignment_of_worked_numbers():
    # Task (0, 3), instruction (4, 0): complex (4, 3) of length 5, cosine 4/5.
    assert Moments(0.0, 9.0, 16.0).alignment == pytest.approx(0.8, abs=1e-15)
    # Task (-2, 0), instruction (1, 0): complex (-1, 0).
    assert Moments(-2.0, 4.0, 1.0).alignment == -1.0
    # Task (-4, 3), instruction (4, 0): complex (0, 3).
    assert Moments(-16.0, 25.0, 16.0).alignment == 0.0


def test_alignment_is_undefined_where_instruction_or_complex_vector_is_zero():
    assert Moments(0.0, 1.0, 0.0).alignment is None
    assert Moments(0.0, 0.0, 0.0).alignment is None
    assert Moments(-1.0, 1.0, 1.0).alignment is None


def test_alignment_of_a_vector_that_learned_nothing_is_one():
    assert {Moments(0.0, 0.0, size / 7).alignment for size in range(1, 1000)} == {1.0}


def test_the_alignment_of_four_million_equal_entries_does_not_exceed_one():
    vector = torch.randn(4_000_000)
    (moments,) = moments_table({"same": tensor_sums(vector, vector)}).values()
    assert moments.alignment <= 1.0
    assert moments.alignment == pytest.approx(1.0, abs=1e-15)
    (opposite,) = moments_table({"opposite": tensor_sums(-3 * vector, vector)}).values()
    assert opposite.alignment >= -1.0
    assert opposite.alignment == pytest.approx(-1.0, abs=1e-15)


def test_alignment_survives_very_large_and_very_small_weights():
    assert Moments(0.0, 9e200, 16e200).alignment == pytest.approx(0.8)
    assert Moments(0.0, 9e-200, 16e-200).alignment == pytest.approx(0.8)


def test_alignment_is_the_cosine_that_numpy_computes_from_the_vectors_themselves():
    rng = np.random.default_rng(0)
    for _ in range(20):
        task, instruction = rng.standard_normal(1000) * rng.uniform(0.01, 3), rng.standard_normal(1000)
        complex_vector = task + instruction
        expected = complex_vector @ instruction / np.linalg.norm(complex_vector) / np.linalg.norm(instruction)
        moments = Moments(task @ instruction, task @ task, instruction @ instruction)
        assert moments.alignment == pytest.approx(expected, abs=1e-14)
