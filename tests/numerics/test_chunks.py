import pytest
import torch

from lata_lightning.numerics.chunks import factor_chunks, streamed
from lata_lightning.numerics.low_rank import Factors, LowRank


@pytest.mark.parametrize("ranges", [[(0, 10)], [(0, 3), (3, 10)], [(2, 4), (7, 8)], [(0, 1), (4, 4 + 5)], [(9, 10)]])
def test_a_stream_of_blocks_gives_any_ranges_that_rise(ranges):
    load = streamed(iter([torch.arange(0, 2), torch.arange(2, 7), torch.arange(7, 10)]), 10)
    assert [load(begin, end).tolist() for begin, end in ranges] == [list(range(begin, end)) for begin, end in ranges]


def test_a_stream_of_blocks_cannot_go_back():
    load = streamed(iter([torch.arange(6)]), 6)
    load(2, 4)
    with pytest.raises(ValueError, match="entries of a stream come in order; those from 3 on were asked for after those before 4"):
        load(3, 5)


def test_the_last_entry_runs_the_blocks_to_their_end():
    done = []

    def blocks():
        yield torch.arange(4)
        done.append(True)

    load = streamed(blocks(), 4)
    load(0, 3)
    assert not done
    load(3, 4)
    assert done


def test_a_range_of_a_product_of_factors_is_that_of_the_dense_product():
    left, right = torch.randn(7, 2), torch.randn(2, 3)
    dense = (left.double() @ right.double()).reshape(-1)
    load = factor_chunks(LowRank((7, 3), (Factors(left, right),)))
    torch.testing.assert_close(load(4, 13), dense[4:13], rtol=0, atol=1e-15)
