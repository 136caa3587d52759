"""Shards of every kind on four CPU processes: each entry of a tensor is counted by exactly one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from placements_run import CASES, REFUSED, WORLD
from small_modules import Part

from lata_lightning.errors import LataError
from lata_lightning.live.placements.ownership import Ownership
from lata_lightning.live.placements.placement import Placement
from lata_lightning.live.placements.region import Region
from lata_lightning.live.ranks import Ranks
from lata_lightning.store.sources import StateDictSource


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of four processes measured, by rank."""
    directory = tmp_path_factory.mktemp("placements")
    script = str(Path(__file__).with_name("placements_run.py"))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), str(directory)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-3000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_the_sums_of_shards_are_those_of_whole_tensors_on_every_process(results, case):
    first = results[0][case]
    assert first["measured"].keys() == first["expected"].keys()
    for name, row in first["expected"].items():
        assert first["measured"][name] == pytest.approx(row, rel=1e-9, abs=1e-15), name
    assert all(other[case]["measured"] == first["measured"] for other in results)


@pytest.mark.parametrize("case", CASES)
def test_the_export_is_the_difference_of_whole_tensors_bit_for_bit(results, case):
    exported = results[0][case]["export"]
    assert len(exported) == 13
    assert all(exported.values()), [name for name, same in exported.items() if not same]


def test_the_fingerprint_of_the_start_is_the_same_however_it_is_sharded(results):
    prints = {case: results[0][case]["fingerprint"] for case in CASES}
    plain = prints.pop("plain tensors")
    for case, found in prints.items():
        assert found == {name: plain[name] for name in found}, case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("experts of each process", r"must have the same values on all of them, and 1 of 12 differ: .*layers\.0\.up\.weight"),
        ("layers of each process", r"every process must have the same tensors, .*layers\.0\.down\.bias \(not on process 2\)"),
    ],
)
def test_what_no_process_can_count_is_refused_on_every_process(results, case, message):
    assert set(REFUSED) == {"experts of each process", "layers of each process"}
    found = {result["refused"][case] for result in results}
    assert len(found) == 1
    with pytest.raises(LataError, match=message):
        raise LataError(found.pop())


class Apart(Ranks):
    """The first of several processes, of which the regions of the others are given."""

    def __init__(self, *others):
        super().__init__()
        self.world, self.others = 1 + len(others), others

    def gathered(self, value):
        return [value, *(dict.fromkeys(value, other) for other in self.others)]


def rows(begin, end):
    return Region((6, 2), ((begin, end), (0, 2)))


@pytest.mark.parametrize(
    ("others", "count"),
    [([rows(0, 3)], 6), ([rows(2, 6)], 14), ([rows(2, 5)], 12), ([rows(4, 6)], 10), ([None], 18), ([Region.flat(12, 6, 12)], 12)],
)
def test_parts_that_overlap_or_leave_a_gap_are_refused_with_their_entries(others, count):
    with pytest.raises(LataError, match=rf"each entry once, and those of 1 tensors do not, 1: \['a \({count} of 12 entries\)'\]"):
        Ownership({"a": Part(torch.zeros(6, 2), rows(0, 3))}, Apart(*others))


def test_each_part_is_owned_by_the_lowest_rank_that_has_it():
    ownership = Ownership(
        {"a": Part(torch.zeros(6, 2), rows(0, 3)), "b": Part(torch.zeros(6, 2), rows(0, 3))}, Apart(rows(3, 6), rows(0, 3), rows(6, 6))
    )
    assert ownership.counts("a")


REGIONS = [Region.whole((6, 4)), Region((6, 4), ((2, 5), (1, 3))), Region.flat(24, 7, 18), Region.flat(24, 3, 3), Region.flat(24, 0, 24)]


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_reads_from_a_source_what_it_is_of_a_tensor(region):
    tensor = torch.randn(6, 4)
    read = region.read(StateDictSource({"a": tensor}), "a")
    assert torch.equal(read, region.of(tensor))
    assert tuple(read.shape) == region.size


def test_a_single_number_has_one_region_in_either_form():
    source = StateDictSource({"a": torch.tensor(3.0)})
    assert Region.whole(()).read(source, "a") == Region.flat(1, 0, 1).read(source, "a")[0] == 3.0


def test_every_placement_has_to_say_all_that_is_asked_of_it():
    with pytest.raises(TypeError, match="abstract"):
        Placement()
