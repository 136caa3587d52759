import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import weights, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.store.weight_files import shard_files


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds no model.safetensors and no pytorch_model.bin, nor an index of either. Is it complete"):
        open_source(tmp_path)


def test_a_directory_of_other_files_names_them(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=r"Its other files are 1: \['weights.pt'\]: give the one you mean"):
        open_source(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path):
    model = write_model(tmp_path / "model", weights(), shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CorruptFileError, match=r"lacks files that model.safetensors.index.json names, 1: \['model-00002-of-00003.safetensors'\]"
    ):
        open_source(model)


def test_shards_of_another_download_are_refused(tmp_path):
    model = write_model(tmp_path / "model", weights(), shards=2)
    save_file({"stranger": torch.ones(1)}, model / "model-00002-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match="lists tensors that its files do not hold, 4: "):
        open_source(model)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "..", "model.bin", 3, ""])
def test_an_index_that_names_anything_but_files_beside_it_is_refused(tmp_path, name):
    model = write_model(tmp_path / "model", weights(), shards=2)
    save_file(weights(), tmp_path / "evil.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptFileError, match="may only name safetensors files in its directory"):
        open_source(model)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "\x00", '{"weight_map": {"a": 1, "b": "x"}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    model = write_model(tmp_path / "model", weights(), shards=2)
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match="is no shard index|is no JSON|must hold a JSON object|may only name"):
        shard_files(model, "model")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is no JSON"), ("[1]", "must hold a JSON object, it holds a list"), ("\xff", "is no JSON")]
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, words):
    model = write_model(tmp_path / "model", weights())
    (model / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptFileError, match=words):
        open_source(model)
