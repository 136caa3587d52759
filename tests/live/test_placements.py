import pytest
import torch

from lata_lightning.errors import LataError
from lata_lightning.live.placements import Shard, check_counted_once
from lata_lightning.live.ranks import Ranks


class Two(Ranks):
    """Two processes, of which the other one counts a given number of entries of each tensor."""

    def __init__(self, other):
        super().__init__()
        self.other = torch.tensor(other)

    def total(self, tensor):
        return tensor + self.other


SHARDS = {"a.weight": Shard(torch.zeros(3)), "b.weight": Shard(torch.zeros(2))}
SIZES = {"a.weight": 5, "b.weight": 2}


def test_parts_that_add_up_to_every_tensor_are_accepted():
    check_counted_once(SHARDS, lambda name: name == "a.weight", SIZES, Two([2, 2]))


@pytest.mark.parametrize(("other", "found"), [([5, 0], "a.weight \\(8 of 5\\)"), ([0, 0], "a.weight \\(3 of 5\\)")])
def test_entries_counted_twice_or_never_are_refused_with_both_numbers(other, found):
    with pytest.raises(LataError, match=f"1 tensors .* do not add up to the tensor, .*{found}"):
        check_counted_once(SHARDS, lambda name: True, SIZES, Two(other))
