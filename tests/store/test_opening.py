import pickle
import zipfile

import pytest
import torch
from tiny_models import same_bits, weights, write_checkpoint, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source


def contents(source):
    return {name: source.read(name) for name in source.names}


def test_a_lightning_checkpoint_gives_the_tensors_of_its_state_dict(tmp_path):
    source = open_source(write_checkpoint(tmp_path / "last.ckpt", weights()))
    assert same_bits(contents(source), {"model." + name: tensor for name, tensor in weights().items()})
    assert source.location == str(tmp_path / "last.ckpt")


def test_a_source_is_opened_as_itself():
    source = open_source(weights())
    assert open_source(source) is source


def test_a_path_that_is_nothing_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(SourceError, match="does not exist: expected a model directory, a file with weights"):
        open_source(tmp_path / "nothing" / "here" / "at all")


def test_a_hub_id_that_cannot_be_had_offline_is_refused_in_one_line():
    with pytest.raises(SourceError, match="nobody/no-such-model is no local directory and could not be downloaded"):
        open_source("nobody/no-such-model")


def test_a_hub_id_is_opened_from_the_cache_with_its_revision(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = write_model(tmp_path / "snapshots" / "0123abc", weights())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, ignore_patterns: str(snapshot))
    source = open_source("org/name")
    assert (source.location, source.revision, source.directory) == ("org/name", "0123abc", snapshot)


def test_a_task_vector_is_refused_where_a_model_is_needed(tmp_path):
    write_model(tmp_path / "vector", weights())
    (tmp_path / "vector" / "task_vector.json").write_text("{}")
    with pytest.raises(SourceError, match="is a task vector, and a model is needed here"):
        open_source(tmp_path / "vector")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_with_code_in_its_pickle_is_read_and_the_code_is_not_run(tmp_path):
    target = tmp_path / "run"
    torch.save({"state_dict": weights(), "hyper_parameters": Malicious(str(target))}, tmp_path / "bad.ckpt")
    assert same_bits(contents(open_source(tmp_path / "bad.ckpt")), weights())
    assert not target.exists()
    # The test itself can tell: unpickled, it would run.
    with pickle.loads(pickle.dumps(Malicious(str(target)))):  # noqa: S301
        assert target.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds a list where a state dict is expected"), ({"model": {}}, "holds no weights"), ({"state_dict": 3}, "holds no weights")],
)
def test_a_checkpoint_without_weights_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(SourceError, match=words):
        open_source(tmp_path / "other.ckpt")


@pytest.mark.parametrize("keep", [100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    data = write_checkpoint(tmp_path / "whole.ckpt", weights()).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    with pytest.raises(CorruptFileError, match=r"cut.ckpt is no readable checkpoint \(.*\). Is it complete"):
        open_source(tmp_path / "cut.ckpt")


@pytest.mark.parametrize(
    "damaged", [b"\x80\x02h\x05.", b"\x80\x02.", b"\x80\x02}K\x01\x81."], ids=["no such memo", "empty stack", "no class"]
)
def test_a_checkpoint_with_a_damaged_pickle_is_refused(tmp_path, damaged):
    write_checkpoint(tmp_path / "whole.ckpt", weights())
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as bad:
        for entry in whole.namelist():
            bad.writestr(entry, damaged if entry.endswith("data.pkl") else whole.read(entry))
    with pytest.raises((CorruptFileError, SourceError), match="bad.ckpt (is no readable checkpoint|holds a)"):
        open_source(tmp_path / "bad.ckpt")
