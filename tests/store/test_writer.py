import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import leftovers, same_bits, weights

from lata_lightning.errors import LataError, OutputError
from lata_lightning.store import writer
from lata_lightning.store.hashing import hash_stored
from lata_lightning.store.writer import (
    ShardWriter,
    atomic_directory,
    check_free,
    check_free_directory,
    layout_size,
    write_json,
)


def layout_of(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(directory, tensors, **options):
    with ShardWriter(directory, "part", layout_of(tensors), **options) as shards:
        for name in shards.order:
            shards.write(name, tensors[name])
    return shards


MIXED = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3).to(torch.bfloat16),
    "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "long": torch.arange(3),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "float16": torch.randn(5).half(),
    "short": torch.arange(3, dtype=torch.int16),
    "int": torch.arange(3, dtype=torch.int32),
    "tiny": torch.arange(3, dtype=torch.int8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 7),
    "näme with spaces / and slashes": torch.ones(1),
}


# The format


def test_safetensors_reads_every_dtype_as_it_was_written(tmp_path):
    write(tmp_path, MIXED, metadata={"format": "pt"})
    assert same_bits(load_file(tmp_path / "part.safetensors"), MIXED)
    with safe_open(tmp_path / "part.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    write(tmp_path, MIXED)
    data = (tmp_path / "part.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert "__metadata__" not in header
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % MIXED[name].element_size() == 0, name


def test_tensors_that_are_not_contiguous_are_written_in_their_order(tmp_path):
    tensors = {"t": torch.arange(6.0).reshape(2, 3).t(), "s": torch.arange(10.0)[::3], "e": torch.ones(1).expand(4)}
    write(tmp_path, tensors)
    found = load_file(tmp_path / "part.safetensors")
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["s"].tolist() == [0, 3, 6, 9]
    assert found["e"].tolist() == [1, 1, 1, 1]


def test_hashes_are_those_of_the_bytes_in_the_file(tmp_path):
    shards = write(tmp_path, MIXED)
    found = load_file(tmp_path / "part.safetensors")
    assert shards.hashes == {name: hash_stored(found[name]) for name in MIXED}


def test_shards_hold_no_more_than_the_limit_unless_one_tensor_does(tmp_path):
    tensors = {"a": torch.ones(10), "b": torch.ones(10), "c": torch.ones(5), "big": torch.ones(100), "d": torch.ones(1)}
    write(tmp_path, tensors, max_shard_bytes=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"part-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)]
    index = json.loads((tmp_path / "part.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 126
    sizes = {}
    for name, file in index["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + 4 * tensors[name].numel()
        assert name in load_file(tmp_path / file)
    assert {file: size for file, size in sizes.items() if size > 100} == {index["weight_map"]["big"]: 400}
    assert set(sizes) == {file.name for file in files}


def test_one_file_needs_no_index(tmp_path):
    write(tmp_path, weights())
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]


def test_no_tensors_make_an_empty_file_that_safetensors_reads(tmp_path):
    write(tmp_path, {})
    assert load_file(tmp_path / "part.safetensors") == {}


def test_what_is_written_is_counted_in_bytes(tmp_path):
    shards = write(tmp_path, MIXED)
    assert shards.written == layout_size(layout_of(MIXED)) == sum(tensor.numel() * tensor.element_size() for tensor in MIXED.values())


def test_json_keeps_its_order_and_its_letters_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"z": "τ", "a": [1, None]})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "z": "τ",\n  "a": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"a": float("nan")})


# Refusals


def test_tensors_may_be_written_in_any_order_and_lie_where_the_layout_says(tmp_path):
    tensors = {"a": torch.arange(2.0), "b": torch.arange(5.0), "c": torch.arange(3.0)}
    for folder, order in (("one", "abc"), ("other", "cab")):
        (tmp_path / folder).mkdir()
        with ShardWriter(tmp_path / folder, "part", layout_of(tensors), max_shard_bytes=24) as shards:
            for name in order:
                shards.write(name, tensors[name])
        assert list(shards.hashes) == ["a", "b", "c"]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 4
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def test_a_tensor_in_pieces_is_the_tensor_in_one(tmp_path):
    tensor = torch.randn(7, 3)
    for folder, pieces in (("whole", [tensor]), ("pieces", tensor.reshape(-1).split(4))):
        (tmp_path / folder).mkdir()
        with ShardWriter(tmp_path / folder, "part", layout_of({"a": tensor})) as shards:
            shards.stream("a", pieces)
        assert shards.hashes["a"] == hash_stored(tensor)
    assert (tmp_path / "whole/part.safetensors").read_bytes() == (tmp_path / "pieces/part.safetensors").read_bytes()


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2, 1)])
def test_a_tensor_of_another_shape_is_refused(tmp_path, tensor):
    with pytest.raises(LataError, match=r"'a' has the shape \(.*\), in the layout it has \(2,\)"):  # noqa: SIM117
        with ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,))}) as shards:
            shards.write("a", tensor)


@pytest.mark.parametrize("pieces", [[torch.ones(2).half()], [torch.ones(2), torch.ones(1)]])
def test_pieces_of_another_dtype_or_too_many_are_refused(tmp_path, pieces):
    with pytest.raises(LataError, match=r"'a' does not fit the layout: expected torch.float32 of the shape \(2,\), got"):  # noqa: SIM117
        with ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,))}) as shards:
            shards.stream("a", pieces)


def test_too_few_pieces_are_refused(tmp_path):
    with pytest.raises(LataError, match="'a' is not whole: 4 bytes are missing"):  # noqa: SIM117
        with ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,))}) as shards:
            shards.stream("a", [torch.ones(1)])


def test_a_tensor_without_a_place_and_one_written_twice_are_refused(tmp_path):
    with pytest.raises(LataError, match="'b' is not in the layout"):  # noqa: SIM117
        with ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,))}) as shards:
            shards.write("b", torch.ones(2))
    (tmp_path / "again").mkdir()
    with pytest.raises(LataError, match="'a' was written before"):  # noqa: SIM117
        with ShardWriter(tmp_path / "again", "part", {"a": (torch.float32, (2,))}) as shards:
            shards.write("a", torch.ones(2))
            shards.write("a", torch.ones(2))


def test_a_layout_that_was_not_filled_is_refused_and_not_left_as_a_truncated_file(tmp_path):
    with pytest.raises(LataError, match=r"not every tensor of the layout was written; missing are 1: \['b'\]"):  # noqa: SIM117
        with ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}) as shards:
            shards.write("a", torch.ones(2))


def test_a_dtype_without_a_name_in_the_format_is_refused(tmp_path):
    with pytest.raises(LataError, match=r"cannot hold every dtype; torch.complex64 and the like are in 1: \['a'\]"):
        ShardWriter(tmp_path, "part", {"a": (torch.complex64, (2,))})


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link", "link to an empty directory"])
def test_a_path_that_exists_in_any_form_is_refused(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
        (path / "theirs").write_text("")
    elif kind == "file":
        path.write_text("")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "empty").mkdir()
        path.symlink_to(tmp_path / "empty")
    for check in (check_free, check_free_directory):
        with pytest.raises(OutputError, match="exists already.* Choose another output path, or remove it first"):
            check(path)
    with pytest.raises(OutputError, match="exists already"), atomic_directory(path):
        pytest.fail("the block must not be entered")
    check_free(tmp_path / "other")
    check_free_directory(tmp_path / "other")


def test_an_empty_directory_is_free_for_a_directory_and_not_for_a_file(tmp_path):
    (tmp_path / "out").mkdir()
    check_free_directory(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        check_free(tmp_path / "out")
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("written")
    assert (tmp_path / "out/file").read_text() == "written"
    assert leftovers(tmp_path) == []


def test_a_mount_point_is_refused_before_any_work_as_nothing_can_be_renamed_onto_it(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(OutputError, match="out is a mount point.*Name a new folder below it"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not be entered")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not be entered")


# Whole or not at all


def test_a_directory_appears_under_its_name_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new parents" / "out"
    with atomic_directory(path) as directory:
        assert directory.parent == path.parent
        (directory / "file").write_text("content")
        assert not path.exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]
    assert (path / "file").read_text() == "content"


def test_a_directory_has_the_permissions_that_the_umask_grants(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), LataError("y")])
def test_an_exception_passes_through_and_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)), atomic_directory(tmp_path / "out") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("content")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_these_words_and_leaves_nothing_behind(tmp_path, code):
    with pytest.raises(OutputError, match=r"the disk is full while writing .*out. Make room"), atomic_directory(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_keep_their_reason(tmp_path):
    with pytest.raises(OutputError, match="out cannot be written: Input/output error"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["mkdtemp", "rename", "chmod"])
def test_a_failure_at_any_step_leaves_nothing_behind(tmp_path, monkeypatch, step):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.tempfile if step == "mkdtemp" else writer.Path, step, fail)
    with pytest.raises(OutputError, match="disk is full"), atomic_directory(tmp_path / "out"):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_noticed_before_the_block_is_entered(tmp_path):
    size = 1 << 60
    with pytest.raises(OutputError, match=r"needs 1,152,921,504,606,846,976 bytes and the disk has [\d,]+ left"):  # noqa: SIM117
        with atomic_directory(tmp_path / "out", size):
            pytest.fail("the block must not be entered")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_someone_else_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="exists already"), atomic_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("theirs")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_files_that_cannot_be_written_are_closed_all_the_same(tmp_path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left")

    shards = ShardWriter(tmp_path, "part", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}, max_shard_bytes=8)
    with pytest.raises(OSError, match="No space left"), shards:
        descriptors = list(shards._open.values())
        monkeypatch.setattr(writer.os, call, fail)
        shards.write("a", torch.ones(2))
        shards.write("b", torch.ones(2))
    monkeypatch.undo()
    assert len(descriptors) == 2
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
