import pytest
import torch
from small_modules import Stack, follow

from lata_lightning import LataError
from lata_lightning.live.live_model import LiveModel
from lata_lightning.live.ranks import Ranks
from lata_lightning.live.replicas import check_replicas, differing, sampled_prints

NAMES = LiveModel(Stack()).names
WEIGHTS = [name for name in NAMES if "running" not in name]


class Two(Ranks):
    """Two processes, of which the other one has the same values except in one tensor, and adds its prints to sums."""

    def __init__(self, other):
        super().__init__()
        self.world, self.other = 2, other

    def gathered(self, value):
        if value is None:
            return [None, None]
        return [value, {name: other if name != "layers.0.attention.weight" else [0, 0] for name, other in value.items()}]

    def total(self, tensor):
        return tensor + torch.cat([sampled_prints(LiveModel(self.other), WEIGHTS), torch.zeros(len(tensor), tensor.shape[1] - 2)], dim=1)


def changed():
    module = Stack()
    with torch.no_grad():
        module.layers[1].attention.weight[0, 0] += 1
    return module


@pytest.mark.parametrize(("other", "expected"), [(Stack(), []), (changed(), ["layers.1.attention.weight"])], ids=["same", "changed"])
def test_copies_on_several_processes_are_compared_by_sums_of_prints(other, expected):
    summed = 2 * sampled_prints(LiveModel(Stack()), WEIGHTS) + sampled_prints(LiveModel(other), WEIGHTS)
    assert differing(NAMES, summed, dict.fromkeys(WEIGHTS, 3)) == expected


def test_copies_that_have_come_to_differ_are_warned_of_once():
    module = Stack()
    tracker, measurement = follow(module)
    tracker.ownership._copies = dict.fromkeys(tracker.live.names, 2)
    tracker.ranks = Two(changed())
    with pytest.warns(UserWarning, match=r"1 parameters of which every process has a copy .* \(1: \['layers.1.attention.weight'\]\)"):
        measurement.sums()
    measurement.sums()


def test_plain_parameters_that_differ_at_the_start_are_refused_by_name():
    with pytest.raises(LataError, match=r"1 of 8 differ: 1: \['layers.0.attention.weight'\]"):
        check_replicas(LiveModel(Stack()), Two(None))
