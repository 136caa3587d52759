import pytest
import torch

from lata_lightning.errors import LayoutMismatchError
from lata_lightning.numerics import inner_products as inner_products_module
from lata_lightning.numerics.inner_products import inner_products
from lata_lightning.numerics.low_rank import Factors, LowRank


def factors(shape, rank, seed, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return LowRank(shape, (Factors(left, right, scale),)), (left.double() @ right.double()) * scale


def tensors(shape, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("shape", [(3, 5), (1100, 1200), (4,), (0, 3), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_product_is_the_sum_over_all_entries_in_float64(shape, dtype):
    tuned, start, *others = tensors(shape, 4, dtype)
    # The difference is rounded to float32 where the weights are no finer.
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    gained = (tuned.to(wide) - start.to(wide)).double()
    expected = torch.stack([(gained * other.double()).sum() for other in others])
    torch.testing.assert_close(inner_products(tuned, others, subtract=start), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(inner_products(gained, others), expected, rtol=1e-12, atol=1e-9)


def test_chunks_on_an_accelerator_add_up_to_the_same_products(monkeypatch):
    monkeypatch.setattr(inner_products_module, "_CHUNK", 7)
    tuned, start, *others = tensors((5, 9), 4)
    expected = torch.stack([((tuned - start).double() * other.double()).sum() for other in others])
    found = torch.stack(inner_products_module._on_device(tuned, others, start))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)


def test_factors_on_either_side_give_the_products_of_their_dense_matrices():
    shape = (6, 9)
    vector, dense_vector = factors(shape, 2, 1)
    other, dense_other = factors(shape, 3, 2)
    (plain,) = tensors(shape, 1)
    expected = torch.stack([(dense_vector * dense_other).sum(), (dense_vector * plain.double()).sum()])
    torch.testing.assert_close(inner_products(vector, [other, plain]), expected, rtol=1e-9, atol=1e-12)
    start, tuned = tensors(shape, 2)
    gained = (tuned - start).double()
    expected = torch.stack([(gained * dense_other).sum(), (gained * plain.double()).sum()])
    torch.testing.assert_close(inner_products(tuned, [other, plain], subtract=start), expected, rtol=1e-9, atol=1e-9)


def test_without_other_vectors_there_are_no_products():
    assert inner_products(torch.ones(3), []).shape == (0,)


def test_other_shapes_are_refused():
    with pytest.raises(LayoutMismatchError, match=r"must have one shape, got \(2, 3\) and \(3, 2\)"):
        inner_products(torch.ones(2, 3), [torch.ones(3, 2)])
