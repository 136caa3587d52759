import pytest
import torch
from sharded_files import contents, pieces, saved, written
from tiny_models import same_bits

from lata_lightning.store.opening import open_source


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_every_dtype_is_read_as_it_was_saved(tmp_path, dtype):
    tensors = {
        "model": {"w": torch.tensor([[0, 1], [1, 0]]).to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.empty(0, 2).to(dtype)}
    }
    assert same_bits(contents(open_source(saved(tmp_path / "d", tensors))), tensors["model"])


WHOLE = torch.arange(42.0).reshape(6, 7)


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 6, 0, 7)], [(0, 4, 0, 7), (4, 6, 0, 7)], [(4, 6, 0, 7), (0, 4, 0, 7)], [(0, 6, 0, 3), (0, 6, 3, 7)],
        [(0, 3, 0, 3), (0, 3, 3, 7), (3, 6, 0, 3), (3, 6, 3, 7)], [(0, 2, 0, 7), (2, 6, 0, 3), (2, 6, 3, 7)],
    ],
    ids=["whole", "rows", "rows backwards", "columns", "both", "uneven"],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 5, 100])
def test_chunks_of_several_processes_are_put_together(tmp_path, cuts, step):
    chunks = [((top, left), WHOLE[top:bottom, left:right].clone()) for top, bottom, left, right in cuts]
    source = open_source(written(tmp_path / "c", chunks, (6, 7)))
    assert source.names == ("w",)
    assert torch.equal(source.read("w"), WHOLE)
    assert torch.equal(source.read_slice("w", (slice(1, 3), slice(0, 7))), WHOLE[1:3])
    assert torch.equal(pieces(source, "w", step), WHOLE.reshape(-1))


def test_an_empty_chunk_of_a_process_that_owns_nothing_is_passed_over(tmp_path):
    source = open_source(written(tmp_path / "c", [((0, 0), WHOLE), ((6, 0), WHOLE[6:])], (6, 7)))
    assert torch.equal(source.read("w"), WHOLE)
