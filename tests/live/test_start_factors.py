import torch

from lata_lightning.live.start_factors import StartFactors
from lata_lightning.numerics.low_rank import Factors, LowRank


def added(left, right):
    return LowRank((2, 3), (Factors(torch.tensor(left), torch.tensor(right), 2.0),))


START = added([[1.0], [2.0]], [[1.0, 0.0, 1.0]])
NOW = added([[1.0], [3.0]], [[1.0, 1.0, 1.0]])
ZERO = added([[0.0], [0.0]], [[1.0, 0.0, 1.0]])


def test_factors_that_start_at_zero_are_not_copied_and_all_of_them_is_gain():
    factors = StartFactors()
    factors.capture("w", ZERO)
    assert len(factors) == 0
    assert factors.since("w", NOW) is NOW
    assert factors.differ("w", NOW)
    assert not factors.differ("w", ZERO)
    assert factors.value_sums("w").tolist() == [0, 0]


def test_the_gain_is_the_difference_of_the_products():
    factors = StartFactors()
    factors.capture("w", START)
    assert factors.names == {"w"}
    # 2·([1; 3]·[1 1 1] − [1; 2]·[1 0 1]), worked by hand.
    assert factors.since("w", NOW).dense().tolist() == [[0.0, 2.0, 0.0], [2.0, 6.0, 2.0]]
    assert not factors.since("w", START).any()
    factors.discard("w")
    assert factors.since("w", START) is START


def test_a_copy_does_not_follow_training_and_can_be_rounded():
    left = torch.tensor([[1.001], [2.0]])
    factors = StartFactors()
    factors.capture("w", LowRank((2, 1), (Factors(left, torch.ones(1, 1)),)))
    left.add_(1)
    factors.cast("w", torch.bfloat16)
    gained = factors.since("w", LowRank((2, 1), (Factors(left, torch.ones(1, 1)),)))
    # 1.001 in bfloat16 is 1.
    torch.testing.assert_close(gained.dense(), torch.tensor([[1.001], [1.0]]), rtol=0, atol=1e-6)
