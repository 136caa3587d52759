"""Merges by singular vectors, beside numpy's decomposition."""

import numpy as np
import pytest
import torch

from lata_lightning.numerics.singular import iso_c, tsv_m


def draw(seed, shape):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_iso_c_makes_all_singular_values_their_mean(shape):
    matrices = [draw(seed, shape) for seed in (1, 2)]
    left, values, right = np.linalg.svd(sum(matrices).numpy(), full_matrices=False)
    np.testing.assert_allclose(iso_c(matrices).numpy(), values.mean() * left @ right, atol=1e-10)


@pytest.mark.parametrize(("shape", "count"), [((6, 9), 2), ((9, 6), 3), ((5, 5), 2), ((2, 7), 3)])
def test_tsv_m_keeps_an_equal_share_of_directions_and_makes_them_orthogonal(shape, count):
    matrices = [draw(seed, shape) for seed in range(count)]
    own = max(1, min(shape) // count)
    parts = [np.linalg.svd(matrix.numpy(), full_matrices=False) for matrix in matrices]
    left = polar(np.concatenate([part[0][:, :own] for part in parts], axis=1))
    values = np.concatenate([part[1][:own] for part in parts])
    right = polar(np.concatenate([part[2][:own] for part in parts]))
    np.testing.assert_allclose(tsv_m(matrices).numpy(), left * values @ right, atol=1e-10)


def test_tsv_m_keeps_matrices_of_orthogonal_directions_as_they_are():
    one, other = torch.zeros(2, 8, 8, dtype=torch.float64)
    one[:4, :4], other[4:, 4:] = draw(1, (4, 4)), draw(2, (4, 4))
    torch.testing.assert_close(tsv_m([one, other]), one + other)


@pytest.mark.parametrize("merge", [iso_c, tsv_m])
def test_directions_without_a_value_stay_zero(merge):
    narrow = [draw(seed, (9, 2)) @ draw(9, (2, 7)) for seed in (1, 2)]
    found = merge(narrow)
    across = draw(3, (7, 7)) - torch.linalg.pinv(draw(9, (2, 7))) @ draw(9, (2, 7)) @ draw(3, (7, 7))
    assert (found @ across).abs().max() < 1e-10
    assert not merge([torch.zeros(3, 4, dtype=torch.float64)] * 2).any()
