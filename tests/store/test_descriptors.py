import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import same_bits, weights, write_model

from lata_lightning import TaskVector
from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.descriptors import DESCRIPTORS, MAX_OPEN, Descriptors, Window, fill, first_bytes
from lata_lightning.store.directories import read_json
from lata_lightning.store.opening import open_source


def files(directory, count):
    for number in range(count):
        (directory / f"{number}").write_bytes(bytes([number]) * 10)
    return [directory / f"{number}" for number in range(count)]


def open_now():
    return len(list(Path("/proc/self/fd").iterdir()))


def open_in(directory):
    return sum(str(directory) in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_a_bounded_number_of_files_is_open_and_all_can_be_read(tmp_path):
    pool = Descriptors(3)
    found = [pool.identify(path) for path in files(tmp_path, 20)]
    assert open_in(tmp_path) == 3
    for number, file in enumerate(found):
        with pool.reading(file) as descriptor:
            assert os.pread(descriptor, 1, 0) == bytes([number])
    assert open_in(tmp_path) == 3
    pool.close(found)
    assert open_in(tmp_path) == 0


def test_a_file_that_is_read_stays_open_however_many_others_are_opened(tmp_path):
    pool = Descriptors(1)
    found = [pool.identify(path) for path in files(tmp_path, 5)]
    with pool.reading(found[0]) as first:
        for file in found[1:]:
            with pool.reading(file):
                pass
        pool.close(found)
        assert os.pread(first, 1, 0) == b"\x00"
    pool.close(found)


def test_many_threads_read_many_files_through_few_descriptors(tmp_path):
    pool = Descriptors(2)
    found = [pool.identify(path) for path in files(tmp_path, 30)]

    def read(number):
        with pool.reading(found[number % 30]) as descriptor:
            return os.pread(descriptor, 10, 0)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(900))) == [bytes([number % 30]) * 10 for number in range(900)]
    pool.close(found)


def test_a_file_that_was_replaced_is_refused(tmp_path):
    pool = Descriptors(1)
    one, other = (pool.identify(path) for path in files(tmp_path, 2))
    (tmp_path / "0").write_bytes(b"something else")
    with pytest.raises(CorruptFileError, match="0 has changed since it was opened"), pool.reading(one):
        pass
    pool.close([other])


def test_descriptors_are_closed_with_their_source(tmp_path):
    model = write_model(tmp_path / "m", weights(), shards=5)
    source = open_source(model)
    assert open_in(model) == 5
    del source
    assert open_in(model) == 0


def test_a_model_of_more_shards_than_files_may_be_open_is_extracted(tmp_path):
    names = {f"layers.{number}.weight": torch.randn(2, 2) for number in range(2 * MAX_OPEN)}
    start = write_model(tmp_path / "start", names, shards=len(names))
    tuned = write_model(tmp_path / "tuned", {name: tensor + 1 for name, tensor in names.items()}, shards=len(names))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now() + MAX_OPEN + 12, hard))
    try:
        saved = TaskVector.between(start, tuned).save(tmp_path / "v")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.allclose(saved[name], torch.ones(2, 2)) for name in names)


def lowest_free():
    """The number that the next descriptor would get; a limit on descriptors is one on their numbers."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def test_idle_descriptors_are_given_up_where_the_limit_is_lower(tmp_path):
    found = [DESCRIPTORS.identify(path) for path in files(tmp_path, 20)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    save_file(weights(), tmp_path / "m.safetensors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), hard))
    try:
        assert same_bits({name: tensor for name in weights() for tensor in [open_source(tmp_path / "m.safetensors").read(name)]}, weights())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        DESCRIPTORS.close(found)


# Diagnoses

REASONS = {
    errno.EACCES: (SourceError, r"may not be read by this user \(Permission denied\)"),
    errno.EPERM: (SourceError, "may not be read by this user"),
    errno.EMFILE: (SourceError, r"too many files are open .* Raise the limit \(ulimit -n\)"),
    errno.ENFILE: (SourceError, "too many files are open"),
    errno.EIO: (SourceError, "cannot be read: Input/output error"),
    errno.ENOENT: (CorruptFileError, "is missing. Copy or download it again"),
    errno.EISDIR: (SourceError, "is no file where one is expected"),
}


def paths(tmp_path):
    model = write_model(tmp_path / "m", weights())
    torch.save(weights(), tmp_path / "a.ckpt")
    shards = write_model(tmp_path / "s", weights(), shards=2)
    return [model, model / "model.safetensors", tmp_path / "a.ckpt", shards]


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
def test_the_reason_is_the_true_one_for_weights_of_every_kind(tmp_path, monkeypatch, number):
    kind, words = REASONS[number]
    given = paths(tmp_path)

    def fail(path, *rest, **more):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", fail)
    for path in given:
        with pytest.raises(kind, match=words):
            open_source(path)


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
def test_the_reason_is_the_true_one_for_json(tmp_path, monkeypatch, number):
    kind, words = REASONS[number]
    model = write_model(tmp_path / "m", weights())

    def fail(path, *rest, **more):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(kind, match=words):
        open_source(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_is_called_so(tmp_path):
    save_file(weights(), tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").chmod(0)
    with pytest.raises(SourceError, match="may not be read by this user"):
        open_source(tmp_path / "m.safetensors")


def test_a_path_that_may_not_be_looked_at_is_called_so(tmp_path, monkeypatch, capsys):
    def fail(path, *rest, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(SourceError, match="may not be read by this user"):
        open_source(tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m")]) == 1
    assert "may not be read by this user" in capsys.readouterr().err


def test_a_directory_in_the_place_of_a_file_is_called_so(tmp_path):
    model = write_model(tmp_path / "m", weights(), shards=2)
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "model-00001-of-00002.safetensors").mkdir()
    with pytest.raises(SourceError, match="is no file where one is expected"):
        open_source(model)


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf{}", b"\xff\xfe{\x00", b"{", b"", b"[" * 100_000, b"1" * 5000], ids=repr)
def test_json_that_is_none_or_in_another_encoding_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CorruptFileError, match=r"a.json is no JSON"):
        read_json(tmp_path / "a.json")


# Reading


def test_a_window_reads_as_the_part_of_the_file_it_shows(tmp_path):
    data = bytes(range(256)) * 1000
    (tmp_path / "a").write_bytes(data)
    file = DESCRIPTORS.identify(tmp_path / "a")
    window, part = Window(file, 100, 200_000), data[100:200_000]
    assert window.read(10) == part[:10]
    assert window.tell() == 10
    assert window.readline() == part[10 : part.index(b"\n", 10) + 1] if b"\n" in part[10:] else True
    assert window.seek(-5, os.SEEK_END) == len(part) - 5
    assert window.read() == part[-5:]
    assert window.read(5) == b""
    assert window.seek(70_000) == 70_000
    assert window.read(100_000) == part[70_000:170_000]
    assert window.seek(-100_000, os.SEEK_CUR) == 70_000
    with pytest.raises(ValueError, match="before the beginning"):
        window.seek(-1)
    DESCRIPTORS.close([file])


def test_a_file_that_ends_early_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    file = DESCRIPTORS.identify(tmp_path / "a")
    with pytest.raises(CorruptFileError, match="has become shorter, or is cut off"):
        fill(memoryview(bytearray(6)), file, 0)
    DESCRIPTORS.close([file])


def test_the_first_bytes_of_a_short_file_are_all_of_them(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    assert first_bytes(tmp_path / "a", 8) == b"12"
    with pytest.raises(SourceError, match="is no file where one is expected"):
        first_bytes(tmp_path, 1)


def test_a_recorded_path_that_is_not_there_hints_at_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "models" / "start", weights(0))
    TaskVector.between("models/start", weights(1)).save("vector")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "../vector", "--to", "hf", "--output", "out"]) == 1
    assert "records its start model as models/start, which is not there, seen from" in (error := capsys.readouterr().err)
    assert "--onto MODEL" in error
    assert main(["export", "../vector", "--to", "hf", "--onto", "../models/start", "--output", "out"]) == 0
