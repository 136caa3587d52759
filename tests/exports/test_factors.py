import pytest
import torch

from lata_lightning.errors import CorruptFileError, LataError
from lata_lightning.exports.factors import Truncation, common_scale, factored, relative, rows_between, squares
from lata_lightning.numerics.low_rank import Factors, LowRank


def matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return values * torch.logspace(0, -2, columns, dtype=torch.float64)


def low_rank(rows, columns, rank, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank((rows, columns), (Factors(left, right, scale),))


def made(shape, parts, truncation=None, *, scale=1.0, side="left", dtype=torch.float32):
    return factored(shape, parts, truncation or Truncation(), scale=scale, scaled_side=side, dtype=dtype)


def product(found):
    return found.scale * (found.left.double() @ found.right.double())


@pytest.mark.parametrize("shape", [(30, 9), (9, 30), (12, 12)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_approximation_of_a_rank_is_nearer_than_the_factors(shape, rank):
    dense = matrix(*shape).float()
    found = made(shape, [(dense, -0.5)], Truncation(rank=rank))
    left, values, right = torch.linalg.svd(-0.5 * dense.double(), full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert found.rank == rank
    torch.testing.assert_close(product(found), best, rtol=0, atol=1e-6)


def test_both_factors_of_a_dense_matrix_have_columns_and_rows_of_one_length():
    found = made((30, 9), [(matrix(30, 9).float(), 1.0)], Truncation(rank=3))
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1))


def test_an_energy_keeps_the_smallest_rank_that_reaches_it():
    # Squares of the singular values: 64, 16, 4, 1, of 85 in all.
    dense = torch.diag(torch.tensor([4.0, 1.0, 8.0, 2.0]))
    ranks = {energy: made((4, 4), [(dense, 1.0)], Truncation(energy=energy)).rank for energy in (0.5, 0.75, 0.76, 0.94, 0.95, 0.99, 1.0)}
    assert ranks == {0.5: 1, 0.75: 1, 0.76: 2, 0.94: 2, 0.95: 3, 0.99: 4, 1.0: 4}


def test_all_energy_of_a_matrix_of_low_rank_is_its_rank():
    dense = low_rank(40, 30, 3, 1.0).dense(torch.float64)
    assert made((40, 30), [(dense, 1.0)], Truncation(energy=1.0)).rank == 3


def test_a_zero_sum_of_dense_matrices_is_factors_of_zeros():
    dense = matrix(6, 4).float()
    found = made((6, 4), [(dense, 1.0), (dense, -1.0)], Truncation(energy=0.9))
    assert not product(found).any()
    assert torch.isfinite(found.left).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_of_low_rank_parts_keeps_its_bits_and_the_other_takes_the_factors(side):
    one, other = low_rank(8, 6, 2, 2.0, seed=1), low_rank(8, 6, 3, 2.0, seed=2)
    found = made((8, 6), [(one, 1.0), (other, -0.37)], scale=2.0, side=side)
    expected = {"left": (one.parts[0].left, other.parts[0].left), "right": (one.parts[0].right.T, other.parts[0].right.T)}
    kept = "right" if side == "left" else "left"
    sides = {"left": found.left, "right": found.right.T}
    assert torch.equal(sides[kept], torch.cat(expected[kept], dim=1))
    first, second = expected[side]
    assert torch.equal(sides[side], torch.cat([first, (second.double() * -0.37).float()], dim=1))


def test_low_rank_and_dense_parts_lie_side_by_side_and_only_the_dense_ones_are_cut():
    low, dense = low_rank(20, 10, 2, 4.0, seed=1), matrix(20, 10, seed=2).float()
    found = made((20, 10), [(low, 0.5), (dense, 3.0)], Truncation(rank=10), scale=4.0)
    assert found.rank == 12
    assert found.cut
    torch.testing.assert_close(product(found), 0.5 * low.dense(torch.float64) + 3.0 * dense.double(), rtol=0, atol=1e-5)


def test_parts_of_different_scales_have_none_in_common():
    one, other = low_rank(4, 3, 1, 2.0), low_rank(4, 3, 1, 0.5)
    assert common_scale([one, one]) == 2.0
    assert common_scale([one, other]) == 1.0
    assert common_scale([]) == 1.0


def test_padding_with_zeros_changes_no_product():
    found = made((6, 4), [(matrix(6, 4).float(), 1.0)], Truncation(rank=2))
    assert torch.equal(product(found.padded(7)), product(found))
    assert found.padded(7).rank == 7


def test_squares_of_an_error_are_those_of_the_dense_matrices():
    low, dense = low_rank(3000, 50, 2, 0.5, seed=1), matrix(3000, 50, seed=2).float()
    parts = [(low, 2.0), (dense, -1.0)]
    wanted = 2.0 * low.dense(torch.float64) - dense.double()
    found = made((3000, 50), parts, Truncation(rank=5))
    error, norm = squares(parts, found.low_rank.rows())
    assert error == pytest.approx((wanted - product(found)).square().sum().item())
    assert norm == pytest.approx(wanted.square().sum().item())


def test_squares_of_what_is_stored_whole_are_those_of_its_rounding():
    before, part = torch.tensor([1.0, -3.0, 0.0]), torch.tensor([2.0**-10, 1.0, -0.5])
    after = (before + part).bfloat16()
    # 1 + 2⁻¹⁰ becomes 1 in bfloat16; the others are exact.
    assert squares([(part, 1.0)], rows_between(before, after)) == (2.0**-20, 2.0**-20 + 1 + 0.25)


def test_an_error_of_nothing_is_undefined():
    assert relative(0.0, 0.0) is None
    assert relative(1.0, 4.0) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4, "energy": 0.5}, "give a rank or an energy, not both: got 4 and 0.5"),
        ({"rank": 0}, "the rank must be at least 1, got 0"),
        ({"energy": 0.0}, r"a share in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"a share in \(0, 1\], got 1.5"),
        ({"energy": float("nan")}, r"a share in \(0, 1\], got nan"),
    ],
)
def test_a_truncation_out_of_range_is_refused(settings, message):
    with pytest.raises(LataError, match=message):
        Truncation(**settings)


def test_a_matrix_with_nan_is_refused():
    dense = torch.ones(3, 3)
    dense[0, 0] = float("nan")
    with pytest.raises(CorruptFileError, match="NaN or infinite values"):
        made((3, 3), [(dense, 1.0)])


def test_factors_too_large_for_their_dtype_are_refused():
    with pytest.raises(CorruptFileError, match="do not fit torch.float16"):
        made((3, 3), [(low_rank(3, 3, 1, 1.0), 1e6)], dtype=torch.float16)
