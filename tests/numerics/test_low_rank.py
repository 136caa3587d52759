"""Factors against whole float64 matrices, which numpy forms entry by entry from the definition."""

import numpy as np
import pytest
import torch

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError
from lata_lightning.numerics.combine import combine
from lata_lightning.numerics.low_rank import Factors, LowRank
from lata_lightning.numerics.measure import tensor_sums

# The third spans several blocks of rows, the last of them shorter than the others.
SHAPES = [(5, 7), (3, 2, 4), (500, 301), (1, 1)]


def factored(shape, ranks=(2, 3), seed=0, dtype=torch.float32):
    """Random factors of a tensor, with another scale for each part."""
    generator = torch.Generator().manual_seed(seed)
    columns = int(np.prod(shape[1:]))
    parts = [
        Factors(
            torch.randn(shape[0], rank, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(dtype),
            0.75 * (index + 1),
        )
        for index, rank in enumerate(ranks)
    ]
    return LowRank(shape, tuple(parts))


def whole(low_rank):
    """The matrix by its definition, in float64."""
    found = np.zeros((low_rank.shape[0], int(np.prod(low_rank.shape[1:]))))
    for left, right, scale in low_rank.parts:
        found += scale * np.einsum("ir,rj->ij", left.detach().double().numpy(), right.detach().double().numpy())
    return torch.from_numpy(found).reshape(low_rank.shape)


def noise(shape, seed=9, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(one, other, rtol=1e-12):
    torch.testing.assert_close(torch.as_tensor(one, dtype=torch.float64), other.double(), rtol=rtol, atol=1e-12)


@pytest.fixture
def no_dense(monkeypatch):
    """Forbids forming the dense matrix."""

    def refuse(*_):
        raise AssertionError("a dense matrix was formed")

    monkeypatch.setattr(LowRank, "dense", refuse)


# --- the tensor ----------------------------------------------------------------------------------------------------------------------------


def test_two_factors_by_hand():
    one = LowRank((2, 2), (Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), 0.5),))
    assert one.dense().tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert one.square().item() == 1.5**2 + 2**2 + 3**2 + 4**2
    assert one.inner_dense(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == 7.0
    assert (one.rank, one.columns) == (1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dense_tensor_is_the_sum_of_the_products_rounded_once(shape, dtype):
    one = factored(shape, dtype=dtype)
    close(one.dense(torch.float64), whole(one), 1e-13)
    assert one.dense().dtype == torch.float32
    assert tuple(one.dense().shape) == shape
    torch.testing.assert_close(one.dense(), whole(one).float(), rtol=1e-6, atol=1e-7)
    assert one.rank == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_from_factors_are_those_of_the_whole_tensors(shape, no_dense):
    one, other, dense = factored(shape), factored(shape, (4,), 1), noise(shape)
    close(one.square(), (whole(one) ** 2).sum())
    close(one.inner(other), (whole(one) * whole(other)).sum(), 1e-10)
    close(one.inner_dense(dense), (whole(one) * dense.double()).sum(), 1e-10)
    assert one.inner(other).dtype == one.square().dtype == one.inner_dense(dense).dtype == torch.float64


def test_a_tensor_without_parts_is_zero():
    nothing, one = LowRank((3, 4), ()), factored((3, 4))
    assert nothing.dense().tolist() == torch.zeros(3, 4).tolist()
    assert (
        nothing.square().item() == nothing.inner(one).item() == one.inner(nothing).item() == nothing.inner_dense(noise((3, 4))).item() == 0
    )
    assert not nothing.any()
    assert nothing.rank == 0
    assert nothing.equals(LowRank((3, 4), ()))
    assert not nothing.equals(one)
    close(one.minus(nothing).dense(torch.float64), whole(one))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_tensor_without_entries_has_no_length(shape):
    one = LowRank(shape, (Factors(torch.ones(shape[0], 2), torch.ones(2, shape[1])),))
    assert tuple(one.dense().shape) == shape
    assert one.square().item() == one.inner_dense(torch.ones(shape)).item() == 0


def test_factors_laid_out_in_any_way_give_the_same_tensor():
    left, right = noise((4, 3)), noise((3, 6))
    turned = LowRank((4, 6), (Factors(left.T.contiguous().T, right.T.contiguous().T, 2.0),))
    assert torch.equal(turned.dense(), LowRank((4, 6), (Factors(left, right, 2.0),)).dense())


def test_a_row_is_the_same_whichever_rows_are_read_beside_it():
    one = factored((500, 301))
    pieces = torch.cat([values for _, _, values in one.rows()])
    assert torch.equal(pieces.float(), one.dense())
    bounds = list(one.blocks())
    assert len(bounds) > 1
    assert [begin for begin, _ in bounds[1:]] == [end for _, end in bounds[:-1]]


def test_scaling_and_subtracting_are_those_of_the_whole_tensors():
    one, other = factored((5, 7)), factored((5, 7), (1,), 1)
    close(one.scaled(-2.5).dense(torch.float64), -2.5 * whole(one))
    close(one.minus(other).dense(torch.float64), whole(one) - whole(other))
    assert one.minus(one).dense().abs().max() < 1e-14
    assert one.minus(one).square().item() >= 0


def test_copies_do_not_follow_their_origin():
    one = factored((5, 7))
    copy, before = one.copy(), whole(one)
    assert copy.equals(one)
    one.parts[0].left.add_(1)
    assert not copy.equals(one)
    close(whole(copy), before)


def test_another_scale_or_another_number_of_parts_is_another_tensor():
    one = factored((5, 7))
    assert not one.equals(one.scaled(2.0))
    assert not one.equals(LowRank(one.shape, one.parts[:1]))


def test_only_parts_with_both_factors_count_as_something():
    assert factored((5, 7)).any()
    assert not LowRank((5, 7), (Factors(torch.zeros(5, 2), torch.ones(2, 7)),)).any()
    assert not LowRank((5, 7), (Factors(torch.ones(5, 2), torch.zeros(2, 7)),)).any()


def test_rounded_factors_make_the_tensor_that_is_read_back():
    one = factored((5, 7))
    lower = one.stored_as(torch.bfloat16)
    assert all(side.dtype == torch.bfloat16 for part in lower.parts for side in part[:2])
    close(
        lower.dense(torch.float64),
        sum(scale * left.bfloat16().double() @ right.bfloat16().double() for left, right, scale in one.parts),
    )


# --- what factors have gained --------------------------------------------------------------------------------------------------------------


def moved(one, size, seed=5):
    generator = torch.Generator().manual_seed(seed)

    def shift(side):
        return (side.double() + size * torch.randn(side.shape, generator=generator, dtype=torch.float64)).to(side.dtype)

    return LowRank(one.shape, tuple(Factors(shift(left), shift(right), scale) for left, right, scale in one.parts))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_what_was_gained_is_the_difference_of_both_tensors(size):
    before = factored((40, 30))
    now = moved(before, size)
    expected = whole(now) - whole(before)
    gained = now.since(before)
    assert (gained.dense(torch.float64) - expected).norm() <= 1e-7 * expected.norm()
    close(gained.square().sqrt(), expected.norm(), 1e-6)
    assert gained.rank == 2 * now.rank


def test_little_that_was_gained_survives_being_stored_in_bfloat16():
    before = factored((40, 30))
    now = moved(before, 1e-4)
    expected = whole(now) - whole(before)

    def error(vector):
        return ((vector.stored_as(torch.bfloat16).dense(torch.float64) - expected).norm() / expected.norm()).item()

    assert error(now.since(before)) < 0.01
    assert error(now.minus(before)) > 1


def test_gained_factors_are_not_below_float32_and_as_wide_as_they_were():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        before = factored((5, 7), dtype=dtype)
        gained = moved(before, 0.5).since(before)
        assert gained.parts[0].left.dtype == gained.parts[1].right.dtype == wide
        expected = whole(moved(before, 0.5)) - whole(before)
        assert (gained.dense(torch.float64) - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize("before", [factored((5, 7), (2, 2)), factored((5, 7), (2,)), factored((5, 7)).scaled(3.0), LowRank((5, 7), ())])
def test_what_was_gained_since_factors_of_another_form_is_the_difference_too(before):
    now = factored((5, 7), seed=3)
    close(now.since(before).dense(torch.float64), whole(now) - whole(before))


# --- three sums ----------------------------------------------------------------------------------------------------------------------------


def sides(shape, dtype=torch.float32):
    """A vector and an instruction vector, each in both forms, with their whole float64 tensors."""
    low, other, dense = factored(shape, dtype=dtype), factored(shape, (1, 2), 1), noise(shape, 3)
    return {"factors": (low, whole(low)), "dense": (dense, dense.double())}, {
        "factors": (other, whole(other)),
        "dense": (noise(shape, 4), noise(shape, 4).double()),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["instruct", "base"])
@pytest.mark.parametrize("along", ["factors", "dense"])
@pytest.mark.parametrize("form", ["factors", "dense"])
def test_the_three_sums_are_the_same_in_every_form(shape, start, along, form, no_dense):
    vectors, instructions = sides(shape)
    (vector, expected), (instruction, direction) = vectors[form], instructions[along]
    task = expected - direction if start == "base" else expected
    sums = tensor_sums(vector, instruction, start=start)
    assert sums.dtype == torch.float64
    scale = (task.norm() * direction.norm()).item()
    wanted = torch.stack([(task * direction).sum(), (task**2).sum(), (direction**2).sum()])
    # Long sums of dense float32 products are made of float32 sums of 256 each.
    least = 1e-10 if expected.numel() < 65536 else 2e-8
    torch.testing.assert_close(sums, wanted, rtol=least, atol=least * scale)


def test_without_an_instruction_vector_only_the_length_is_known(no_dense):
    one = factored((5, 7))
    inner, task, instruction = tensor_sums(one).tolist()
    assert (inner, instruction) == (0, 0)
    assert task == pytest.approx((whole(one) ** 2).sum().item())


@pytest.mark.parametrize("start", ["instruct", "base"])
def test_weights_that_are_still_to_be_subtracted_go_along_factors_too(start, no_dense):
    tuned, before, instruction = noise((5, 7), 1), noise((5, 7), 2), factored((5, 7))
    expected = tensor_sums(tuned - before, whole(instruction), start=start)
    torch.testing.assert_close(tensor_sums(tuned, instruction, subtract=before, start=start), expected, rtol=1e-6, atol=1e-9)


def test_a_vector_that_is_the_instruction_vector_leaves_no_task(no_dense):
    one = factored((5, 7))
    inner, task, instruction = tensor_sums(one, one.copy(), start="base").tolist()
    assert (inner, task) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert task >= 0
    assert instruction == pytest.approx((whole(one) ** 2).sum().item())


def test_shapes_and_starts_are_checked_for_factors_too():
    one = factored((5, 7))
    with pytest.raises(LayoutMismatchError, match=r"got \(5, 7\) and \(7, 5\)"):
        tensor_sums(one, factored((7, 5)))
    with pytest.raises(LayoutMismatchError, match=r"got \(7, 5\) and \(5, 7\)"):
        tensor_sums(noise((7, 5)), one)
    with pytest.raises(LataError, match="unknown start 'nowhere'"):
        tensor_sums(one, one, start="nowhere")
    with pytest.raises(LataError, match="needs the instruction vector"):
        tensor_sums(one, start="base")


# --- added to weights ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_plus_factors_and_dense_vectors_are_summed_in_float64_and_rounded_once(shape, dtype, no_dense):
    onto, one, other, dense = noise(shape, 2, dtype), factored(shape), factored(shape, (1,), 1), noise(shape, 3)
    exact = onto.double() + 0.5 * whole(one) - 1.25 * whole(other) + 0.125 * dense.double()
    merged = combine(onto, [(one, 0.5), (other, -1.25), (dense, 0.125)], dtype)
    assert merged.dtype == dtype
    # Half of a unit in the last place, with room for the rounding of the float64 sum itself.
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((merged.double() - exact).abs() <= 0.5 * unit * (1 + 1e-6) + 1e-7 * torch.finfo(dtype).eps).all()


def test_adding_factors_and_taking_them_off_again_in_one_merge_leaves_every_bit():
    onto, one = noise((500, 301)), factored((500, 301))
    onto[0, 0] = -0.0
    merged = combine(onto, [(one, 0.3), (one, -0.3)], torch.float32)
    assert torch.equal(merged.view(torch.int32), onto.view(torch.int32))


def test_factors_that_are_not_finite_are_refused():
    one = factored((5, 7))
    one.parts[0].left[0, 0] = float("nan")
    with pytest.raises(CorruptFileError, match="NaN or infinite"):
        combine(noise((5, 7)), [(one, 1.0)], torch.float32)
    with pytest.raises(CorruptFileError, match="too large for torch.float16"):
        combine(noise((5, 7)), [(factored((5, 7)), 1e6)], torch.float16)
