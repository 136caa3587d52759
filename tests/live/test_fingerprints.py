import torch

from lata_lightning.live.fingerprints import Fingerprints
from lata_lightning.live.ranks import Ranks


def fingerprints(values):
    """Of numbers by name, each its own sum; a name that is not counted here has None."""
    return Fingerprints(Ranks(), lambda name: None if values[name] is None else torch.tensor([values[name], values[name] ** 2]))


def test_sums_come_by_name_and_are_zero_where_this_process_counts_nothing():
    assert fingerprints({"b": 3, "a": 2, "c": None}).of(["b", "a", "c"]) == {"a": [2, 4], "b": [3, 9], "c": [0, 0]}


def test_a_frozen_tensor_that_changed_is_known_also_after_it_was_unfrozen():
    values = {"teacher": 1, "student": 2, "norm": 3}
    known = fingerprints(values)
    known.note_frozen(values)
    assert known.moved_frozen(set()) == []
    values["teacher"] = 5
    assert known.moved_frozen(set()) == ["teacher"]
    known.note_unfrozen(["teacher", "student"])
    # Both can change from now on, and what student becomes is training.
    values["student"] = 7
    assert known.moved_frozen({"teacher", "student"}) == ["teacher"]


def test_uncertain_is_what_changed_and_what_was_never_noted():
    values = {"same": 1, "changed": 2, "new": 3}
    known = fingerprints(values)
    known.note_frozen(["same", "changed"])
    values["changed"] = 4
    assert known.uncertain(["same", "changed", "new"]) == ["changed", "new"]


def test_start_sums_stay_as_they_were_noted():
    values = {"a": 1, "b": 2}
    known = fingerprints(values)
    known.note_start(["a"])
    values["a"] = 9
    known.note_start(["b"])
    assert known.start == {"a": [1, 1], "b": [2, 4]}
