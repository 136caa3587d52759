import math

import pytest
import torch

from lata_lightning.errors import CorruptFileError, LataError, LayoutMismatchError
from lata_lightning.moments import Moments
from lata_lightning.numerics.measure import difference, moments_table, tensor_sums


def closed_form(task, instruction):
    """The three sums in numpy, with exactly rounded summation."""
    one, other = (tensor.double().reshape(-1).numpy() for tensor in (task, instruction))
    return [math.fsum(one * other), math.fsum(one * one), math.fsum(other * other)]


def test_the_sums_of_a_small_vector_are_what_they_are_by_hand():
    sums = tensor_sums(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4.0, 0.5, 1.0]))
    assert sums.tolist() == [4 + 1 - 3, 1 + 4 + 9, 16 + 0.25 + 1]
    assert sums.dtype == torch.float64


CHUNK = 128 * 1024


@pytest.mark.parametrize("size", [65535, 65536, 65537, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 65539])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_sums_agree_with_numpy_across_the_bounds_of_chunks(size, dtype):
    task, instruction = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    # Relative to the norms: the inner product of random vectors nearly cancels.
    expected = closed_form(task, instruction)
    norms = [math.sqrt(expected[1] * expected[2]), expected[1], expected[2]]
    for found, wanted, norm in zip(tensor_sums(task, instruction).tolist(), expected, norms, strict=True):
        assert abs(found - wanted) <= 1e-14 * norm


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-10, 1.0, 1e15, 1e18])
def test_long_vectors_of_any_size_keep_their_length(size):
    # Squares of the smallest and the largest fit no float32.
    task = torch.randn(2 * CHUNK) * size
    _, square, _ = closed_form(task, task)
    assert tensor_sums(task)[1].item() == pytest.approx(square, rel=1e-14)


def test_a_long_vector_with_few_entries_keeps_its_length():
    task = torch.zeros(2 * CHUNK)
    task[CHUNK + 7] = 1e-25
    assert tensor_sums(task)[1].item() == pytest.approx(1e-50, rel=1e-6)


def test_a_known_length_of_the_instruction_vector_is_not_measured_again():
    task, instruction = torch.randn(2, CHUNK)
    assert tensor_sums(task, instruction, instruction_squared=5.0).tolist() == [*tensor_sums(task, instruction)[:2].tolist(), 5.0]


def test_the_sums_do_not_depend_on_the_number_of_threads():
    task, instruction, start = torch.randn(3, 3 * CHUNK + 70001)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(tensor_sums(task, instruction, subtract=start))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("last", [65535, 65536, 65537])
def test_the_last_entry_of_the_last_chunk_is_counted_once(last):
    task = torch.zeros(last + 1)
    task[last] = 3.0
    assert tensor_sums(task, 2 * task).tolist() == [18.0, 9.0, 36.0]


def test_a_scalar_and_an_empty_tensor_have_sums():
    assert tensor_sums(torch.tensor(3.0), torch.tensor(-2.0)).tolist() == [-6.0, 9.0, 4.0]
    assert tensor_sums(torch.empty(0, 5), torch.empty(0, 5)).tolist() == [0.0, 0.0, 0.0]


def test_the_order_in_memory_does_not_matter():
    task, instruction = torch.randn(300, 500), torch.randn(500, 300)
    strided = tensor_sums(task.t(), instruction)
    packed = tensor_sums(task.t().contiguous(), instruction)
    assert torch.equal(strided, packed)
    sliced = torch.arange(10.0)[::2]
    assert tensor_sums(sliced, torch.ones(5)).tolist() == [20.0, 0 + 4 + 16 + 36 + 64, 5.0]


def test_sums_of_half_precision_are_those_of_the_values_and_do_not_overflow():
    # 60000² is far beyond float16, and 1 + 2⁻¹¹ is no bfloat16.
    assert tensor_sums(torch.full((4,), 60000.0, dtype=torch.float16)).tolist() == [0.0, 4 * 60000.0**2, 0.0]
    assert tensor_sums(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 + 2**-11])).tolist() == [
        1 + 2**-11,
        1.0,
        (1 + 2**-11) ** 2,
    ]


def test_sums_add_up_over_the_shards_of_a_tensor():
    task, instruction = torch.randn(3000, 70), torch.randn(3000, 70)
    whole = tensor_sums(task, instruction)
    parts = sum(tensor_sums(*pair) for pair in zip(task.split(701), instruction.split(701), strict=True))
    norms = torch.tensor([math.sqrt(whole[1] * whole[2]), whole[1], whole[2]])
    assert ((whole - parts).abs() <= 1e-14 * norms).all()


def test_small_integers_add_up_over_shards_to_the_last_bit():
    task = torch.randint(-8, 9, (70001,)).float()
    whole = tensor_sums(task, task.roll(1))
    parts = sum(tensor_sums(*pair) for pair in zip(task.split(9973), task.roll(1).split(9973), strict=True))
    assert torch.equal(whole, parts)


def test_a_vector_that_started_from_base_gives_the_sums_of_the_task_vector_in_it():
    task, instruction = torch.randint(-9, 9, (70000,)).float(), torch.randint(-9, 9, (70000,)).float()
    from_instruct = tensor_sums(task, instruction)
    from_base = tensor_sums(task + instruction, instruction, start="base")
    assert torch.equal(from_instruct, from_base)


def test_subtracting_the_start_on_the_way_equals_subtracting_it_before():
    start, tuned, instruction = torch.randn(70001), torch.randn(70001), torch.randn(70001)
    assert torch.equal(tensor_sums(tuned, instruction, subtract=start), tensor_sums(tuned - start, instruction))
    assert torch.equal(tensor_sums(tuned, instruction, subtract=start, start="base"), tensor_sums(tuned - start, instruction, start="base"))


def test_subtracting_half_precision_weights_on_the_way_loses_nothing():
    # 256 − 2⁻⁷ needs 15 bits; bfloat16 has 8.
    tuned, start = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([2.0**-7], dtype=torch.bfloat16)
    assert tensor_sums(tuned, subtract=start).tolist() == [0.0, (256 - 2**-7) ** 2, 0.0]


def test_measuring_changes_no_input_and_asks_for_no_gradient():
    task, instruction, start = (torch.randn(100, requires_grad=True) for _ in range(3))
    before = [tensor.detach().clone() for tensor in (task, instruction, start)]
    sums = tensor_sums(task, instruction, subtract=start, start="base")
    assert not sums.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(before, (task, instruction, start), strict=True))


def test_without_an_instruction_vector_only_the_length_of_the_task_vector_is_known():
    assert tensor_sums(torch.tensor([3.0, 4.0])).tolist() == [0.0, 25.0, 0.0]


def test_differences_are_taken_at_the_wider_precision_and_never_below_float32():
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    assert difference(torch.tensor([1.0078125], dtype=torch.bfloat16), half).tolist() == [0.0078125]
    assert difference(half, half).dtype == torch.float32
    assert difference(half, half.half()).dtype == torch.float32
    wide = difference(torch.tensor([1 + 2**-40], dtype=torch.float64), half)
    assert wide.dtype == torch.float64
    assert wide.item() == 2**-40


def test_tensors_of_two_shapes_are_refused_even_where_they_flatten_alike():
    with pytest.raises(LayoutMismatchError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        tensor_sums(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(LayoutMismatchError, match=r"got \(2, 3\) and \(6,\)"):
        tensor_sums(torch.zeros(2, 3), subtract=torch.zeros(6))


def test_a_base_start_without_an_instruction_vector_is_refused():
    with pytest.raises(LataError, match="started from base needs the instruction vector"):
        tensor_sums(torch.zeros(2), start="base")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    good, broken = torch.ones(3), torch.tensor([1.0, value])
    sums = {"fine": tensor_sums(good, good), "broken": tensor_sums(torch.ones(2), broken)}
    with pytest.raises(CorruptFileError, match=r"NaN or infinite values in 1: \['broken'\]"):
        moments_table(sums)


def test_a_table_holds_the_sums_as_numbers_in_the_order_given():
    table = moments_table({"b": torch.tensor([1.0, 2.0, 3.0]), "a": torch.tensor([4.0, 5.0, 6.0])})
    assert list(table.items()) == [("b", Moments(1.0, 2.0, 3.0)), ("a", Moments(4.0, 5.0, 6.0))]
    assert moments_table({}) == {}
