import peft
import pytest
import torch
from adapter_models import adapter
from small_vectors import vector, weighted
from tiny_models import weights, write_model

from lata_lightning.errors import SourceError
from lata_lightning.vectors.inspection import describe


def test_a_vector_is_described_by_its_manifest(tmp_path):
    task = weighted(vector(weights(1)), "linear").save(tmp_path / "vector")
    facts = describe(tmp_path / "vector")
    assert facts["holds"] == "task vector"
    assert facts["start"].startswith("instruct: weights in memory (blake3:")
    assert (facts["tensors"], facts["unchanged tensors"], facts["tensors in factors"]) == (len(weights()), 0, 0)
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights().values())
    assert (facts["dtype"], facts["weighting"], facts["level"]) == ("float32", "linear", "block")
    assert facts["alignment spread"] == round(task.manifest.alignment.spread, 6)


def test_a_model_is_described_by_the_headers_of_its_files(tmp_path):
    facts = describe(write_model(tmp_path / "model", weights(dtype=torch.float16), shards=2, config={"architectures": ["Made"]}))
    assert facts["format"] == "model directory, safetensors, 2 shards"
    assert (facts["architecture"], facts["dtype"], facts["tensors"]) == ("Made", "float16", len(weights()))


def test_an_adapter_is_described_by_its_config_and_file(tmp_path):
    start, directory, _ = adapter(tmp_path, config=peft.LoraConfig)
    facts = describe(directory)
    assert (facts["holds"], facts["type"], facts["base"], facts["rank"]) == ("peft adapter", "LORA", str(start), 3)
    assert facts["tensors"] == 8


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        describe(tmp_path / "nothing")
