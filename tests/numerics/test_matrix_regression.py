"""The regression of one matrix from the vectors alone, beside numpy in float64."""

import numpy as np
import pytest
import torch

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.numerics.chunks import tensor_chunks
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.matrix_regression import Figures, Operand, Settings, regressed, regressed_factors, solved_in_rows

WIDE, SQUARE, TALL = (3, 20), (6, 6), (40, 5)


def draw(seed, shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def by_numpy(matrices, ridge=1.0, prior="sum"):
    """The formula as it stands."""
    grams = [matrix.T @ matrix for matrix in matrices]
    total = sum(grams)
    penalty = ridge * np.mean(np.diag(total))
    aim = sum(matrices) / (1 if prior == "sum" else len(matrices))
    products = sum(matrix @ gram for matrix, gram in zip(matrices, grams, strict=True))
    return (products + penalty * aim) @ np.linalg.inv(total + penalty * np.eye(len(total)))


def operand(matrix, factors=None):
    held = torch.as_tensor(matrix)
    return Operand(tensor_chunks(held), tensor_chunks(held), factors)


def solve(matrices, factors=None, **options):
    """The matrix, and what was found out."""
    figures = Figures.empty(len(matrices))
    operands = [operand(matrix, held) for matrix, held in zip(matrices, factors or [None] * len(matrices), strict=True)]
    blocks = list(regressed(operands, matrices[0].shape, Settings(**options), figures))
    return torch.cat(blocks).double().numpy(), figures


def low_rank(seed, shape, rank):
    left, right = draw(seed, (shape[0], rank)), draw(seed + 100, (rank, shape[1]))
    return LowRank(shape, (Factors(torch.as_tensor(left), torch.as_tensor(right), 0.5),)), 0.5 * left @ right


def test_a_two_by_two_case_is_what_it_is_by_hand():
    # Σ C = diag(2, 4), so λ = 3; Σ τ C + λ Σ τ = diag(2 + 6, 8 + 6).
    one, other = np.diag([1.0, 0.0]), np.diag([1.0, 2.0])
    found, figures = solve([one, other])
    np.testing.assert_allclose(found, np.diag([1.6, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(figures.lost, [0.36, 0.36])
    np.testing.assert_allclose(figures.own, [1.0, 17.0])
    assert figures.condition == pytest.approx(7 / 3)


@pytest.mark.parametrize("prior", ["sum", "mean"])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
@pytest.mark.parametrize("count", [2, 3])
def test_every_shape_equals_numpy_on_the_formula(count, shape, ridge, prior):
    matrices = [draw(seed, shape) for seed in range(count)]
    found, figures = solve(matrices, ridge=ridge, prior=prior)
    expected = by_numpy(matrices, ridge, prior)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    for number, matrix in enumerate(matrices):
        lost = np.linalg.norm((expected - matrix) @ matrix.T) ** 2
        assert figures.lost[number] == pytest.approx(lost, rel=1e-6)
        assert figures.own[number] == pytest.approx(np.linalg.norm(matrix @ matrix.T) ** 2, rel=1e-6)
    total = sum(matrix.T @ matrix for matrix in matrices)
    penalty = ridge * np.trace(total) / len(total)
    assert figures.condition == pytest.approx(1 + np.linalg.eigvalsh(total)[-1] / penalty, rel=0.02)


def test_both_solves_are_used_and_agree_to_rounding():
    assert solved_in_rows([operand(draw(0, WIDE))] * 2, WIDE)
    assert not solved_in_rows([operand(draw(0, TALL))] * 2, TALL)
    # The same matrices are solved in rows, or by their inputs when rows of zeros make them too many.
    matrices = [draw(seed, WIDE) for seed in (1, 2)]
    padded = [np.concatenate([matrix, np.zeros((20, 20))]) for matrix in matrices]
    assert not solved_in_rows([operand(matrix) for matrix in padded], padded[0].shape)
    np.testing.assert_allclose(solve(matrices)[0], solve(padded)[0][:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
def test_one_vector_gives_itself_and_so_does_one_beside_zeros(shape):
    matrix = draw(1, shape)
    for others in ([], [np.zeros(shape)], [np.zeros(shape)] * 2):
        found, figures = solve([matrix, *others])
        np.testing.assert_allclose(found, matrix, rtol=1e-6)
        assert figures.condition == 0
    assert not solve([np.zeros(shape)] * 2)[0].any()


@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
def test_a_large_ridge_gives_task_arithmetic(shape):
    matrices = [draw(seed, shape) for seed in range(3)]
    np.testing.assert_allclose(solve(matrices, ridge=1e9)[0], sum(matrices), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(solve(matrices, ridge=1e9, prior="mean")[0], sum(matrices) / 3, rtol=1e-5, atol=1e-6)


def test_vectors_of_orthogonal_rows_are_each_kept_in_the_limit():
    basis = np.linalg.qr(draw(0, (12, 12)))[0]
    one, other = draw(1, (7, 3)) @ basis[:3], draw(2, (7, 4)) @ basis[3:7]
    found, figures = solve([one, other], ridge=1e-9)
    np.testing.assert_allclose(found, one + other, atol=1e-5)
    np.testing.assert_allclose(found @ basis[:3].T, one @ basis[:3].T, atol=1e-5)
    assert all(lost < 1e-9 * own for lost, own in zip(figures.lost, figures.own, strict=True))


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_the_order_of_the_vectors_changes_nothing_but_rounding(shape):
    matrices = [draw(seed, shape) for seed in range(3)]
    np.testing.assert_allclose(solve(matrices)[0], solve(matrices[::-1])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("factor", [1e-6, -3.0, 1e4])
def test_scaling_all_vectors_scales_the_result(shape, factor):
    matrices = [draw(seed, shape) for seed in range(2)]
    scaled, figures = solve([factor * matrix for matrix in matrices])
    np.testing.assert_allclose(scaled / factor, solve(matrices)[0], rtol=1e-6, atol=1e-6)
    shares = [lost / own for lost, own in zip(figures.lost, figures.own, strict=True)]
    expected = solve(matrices)[1]
    np.testing.assert_allclose(shares, [lost / own for lost, own in zip(expected.lost, expected.own, strict=True)], rtol=1e-6)


@pytest.mark.parametrize(("ranks", "shape"), [((2, 3), (9, 11)), ((1, 1), (9, 11)), ((4, 4), (6, 5)), ((7, 2), (6, 5))])
def test_factors_give_the_matrix_of_the_dense_solve_and_the_sum_of_ranks(ranks, shape):
    held, dense = zip(*(low_rank(seed, shape, rank) for seed, rank in enumerate(ranks)), strict=True)
    figures = Figures.empty(2)
    found = regressed_factors(held, shape, Settings(), figures)
    expected, dense_figures = solve(list(dense))
    np.testing.assert_allclose(found.dense(torch.float64).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert found.rank == sum(ranks)
    np.testing.assert_allclose(figures.lost, dense_figures.lost, rtol=1e-6)
    np.testing.assert_allclose(figures.own, dense_figures.own, rtol=1e-6)
    assert figures.condition == pytest.approx(dense_figures.condition, rel=1e-2)


def test_a_dense_vector_beside_factors_gives_the_matrix_of_dense_ones():
    shape = (4, 15)
    held, factors_dense = low_rank(1, shape, 2)
    dense = draw(2, shape)
    mixed, figures = solve([factors_dense, dense], [held, None])
    expected, dense_figures = solve([factors_dense, dense])
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(figures.lost, dense_figures.lost, rtol=1e-6)
    # Two ranks and two rows are fewer than five inputs, two rows twice are not.
    assert solved_in_rows([operand(draw(0, (3, 5)), low_rank(0, (3, 5), 1)[0]), operand(draw(1, (3, 5)))], (3, 5))
    assert not solved_in_rows([operand(draw(0, (3, 5)))] * 2, (3, 5))


def test_factors_that_are_zero_give_zero():
    nothing = LowRank(WIDE, (Factors(torch.zeros(3, 2), torch.ones(2, 20)),))
    assert not regressed_factors([nothing, nothing], WIDE, Settings(), Figures.empty(2)).dense().any()


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(shape, value):
    broken = draw(1, shape)
    broken[0, 0] = value
    with pytest.raises(CorruptFileError, match="NaN or infinite"):
        solve([draw(0, shape), broken])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "the ridge must be positive and finite, got 0"),
        ({"ridge": -1.0}, "the ridge must be positive"),
        ({"ridge": float("inf")}, "the ridge must be positive"),
        ({"prior": "most"}, "unknown prior 'most'; choose one of sum, mean"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(LataError, match=message):
        Settings(**options)


def test_a_ridge_that_is_lost_in_rounding_is_refused():
    narrow = draw(0, (30, 2)) @ draw(1, (2, 10))
    with pytest.raises(LataError, match="the ridge 1e-30 is lost in rounding"):
        solve([narrow, 2 * narrow], ridge=1e-30)
