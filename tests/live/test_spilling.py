import pytest
import torch
from small_modules import Part

from lata_lightning import LataError
from lata_lightning.errors import CorruptFileError
from lata_lightning.live.placements.region import Region
from lata_lightning.live.start_weights import Spill, StartWeights

WHOLE = torch.arange(35.0).reshape(7, 5)


def box(rows, columns):
    return Region((7, 5), (rows, columns))


ROWS = [box((0, 3), (0, 5)), box((3, 3), (0, 5)), box((3, 7), (0, 5))]
COLUMNS = [box((0, 7), (0, 2)), box((0, 7), (2, 5))]
RANGES = [Region.flat(35, 0, 12), Region.flat(35, 12, 24), Region.flat(35, 24, 35)]
WANTED = [
    box((0, 7), (0, 5)),
    box((2, 5), (0, 5)),
    box((1, 6), (2, 4)),
    box((4, 4), (0, 5)),
    Region.flat(35, 3, 29),
    Region.flat(35, 35, 35),
]


def spilled(directory, regions):
    spill = Spill(directory)
    for rank, region in enumerate(regions):
        spill.write(rank, {"w": region.of(WHOLE)}, {"w": region})
    return Spill(directory)


@pytest.mark.parametrize("regions", [ROWS, COLUMNS, RANGES], ids=["rows", "columns", "ranges of entries"])
@pytest.mark.parametrize("wanted", WANTED)
def test_parts_of_a_tensor_are_put_together_for_any_other_cut(tmp_path, regions, wanted):
    read = spilled(tmp_path, regions).read("w", Part(WHOLE, wanted))
    assert torch.equal(read, wanted.of(WHOLE))
    assert tuple(read.shape) == wanted.size


def test_a_part_that_is_missing_is_refused(tmp_path):
    spilled(tmp_path, ROWS)
    (tmp_path / "rank-00002-000.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="hold 15 of 35 entries of w"):
        Spill(tmp_path).read("w", Part(WHOLE, Region.whole((7, 5))))


def test_what_was_not_kept_cannot_be_read():
    with pytest.raises(LataError, match="start value of w was not kept"):
        StartWeights().read("w", Part(WHOLE, Region.whole((7, 5))))
