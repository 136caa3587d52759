import pytest
import torch
from sharded_files import written

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source

WHOLE = torch.arange(42.0).reshape(6, 7)


def bent(**changes):
    def change(metadata):
        for path, value in changes.items():
            if path == "file":
                next(iter(metadata.storage_data.values())).relative_path = value
            elif path == "length":
                next(iter(metadata.storage_data.values())).length = value
            elif path == "compressed":
                next(iter(metadata.storage_data.values())).transform_descriptors = value
            else:
                setattr(metadata, path, value)

    return change


@pytest.mark.parametrize(
    ("chunks", "size", "change", "words"),
    [
        ([((0, 0), WHOLE[:4])], (6, 7), bent(), "do not make it up"),
        ([((0, 0), WHOLE[:4]), ((3, 0), WHOLE[3:5])], (6, 7), bent(), "do not make it up"),
        ([((0, 0), WHOLE[:, :4]), ((0, 2), WHOLE[:, 2:5])], (6, 7), bent(), "do not make it up"),
        ([((1, 0), WHOLE)], (6, 7), bent(), "lies outside of it"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="../x"), "outside of its directory"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="/etc/passwd"), "outside of its directory"),
        ([((0, 0), WHOLE)], (6, 7), bent(file="gone.distcp"), "gone.distcp is missing"),
        ([((0, 0), WHOLE)], (6, 7), bent(storage_data={}), "no readable metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(state_dict_metadata=3), "no readable metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(length=10), "no readable checkpoint"),
        ([((0, 0), WHOLE.double())], (6, 7), bent(), "does not match the .metadata"),
        ([((0, 0), WHOLE)], (6, 7), bent(compressed=["zstd"]), "is compressed"),
    ],
    ids=[
        "too few", "overlapping rows", "overlapping columns", "outside", "a path up", "an absolute path", "no file", "no places", "no tensors", "cut off",
        "another dtype", "compressed",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(tmp_path, chunks, size, change, words):
    directory = written(tmp_path / "c", chunks, size, change=change)
    with pytest.raises((CorruptFileError, SourceError), match=words):
        open_source(directory).read("w")


def test_nothing_in_the_metadata_is_run(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'made'}",)

    directory = written(tmp_path / "c", [((0, 0), WHOLE)], (6, 7), change=bent(storage_meta=Evil()))
    assert torch.equal(open_source(directory).read("w"), WHOLE)
    assert not (tmp_path / "made").exists()
