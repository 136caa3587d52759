import pytest
import torch
from safetensors.torch import save_file
from tiny_models import same_bits, weights, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source


def contents(source):
    return {name: source.read(name) for name in source.names}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_gives_its_tensors_from_one_file_or_several(tmp_path, shards):
    source = open_source(write_model(tmp_path / "model", weights(), shards=shards, config={"hidden_size": 4}))
    assert same_bits(contents(source), weights())
    assert source.config == {"model_type": "made-up", "hidden_size": 4}
    assert source.location == source.label == str(tmp_path / "model")
    assert source.directory == tmp_path / "model"
    assert source.shape("model.embed_tokens.weight") == (6, 4)
    assert source.dtype("model.embed_tokens.weight") == torch.float32


def test_a_single_safetensors_file_is_a_source(tmp_path):
    save_file(weights(), tmp_path / "any name.safetensors")
    source = open_source(tmp_path / "any name.safetensors")
    assert same_bits(contents(source), weights())
    assert source.directory is None


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)  # fmt: skip
def test_every_supported_dtype_is_read_as_it_was_written(tmp_path, dtype):
    tensors = {
        "full": torch.tensor([[0, 1], [1, 0]]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert same_bits(contents(source), tensors)
    assert all(source.dtype(name) == dtype for name in tensors)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, keep):
    model = write_model(tmp_path / "model", weights())
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CorruptFileError, match=r"no readable safetensors file \(.*\). Is it complete"):
        open_source(model)


def test_a_dtype_that_is_not_supported_is_refused_by_name(tmp_path):
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match="must hold the weights in full; they are quantised by fp8"):
        open_source(tmp_path / "a.safetensors")
