import pytest
import torch
from in_factors import InFactors
from safetensors.torch import save_file
from tiny_models import llama, same_bits, weights

from lata_lightning.errors import SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.store.sources import Origin, StateDictSource


def contents(source):
    return {name: source.read(name) for name in source.names}


def test_a_module_and_its_state_dict_are_sources_that_share_memory():
    model = llama(0)
    for source in (open_source(model), open_source(model.state_dict())):
        assert same_bits(contents(source), model.state_dict())
        assert source.read("model.norm.weight").data_ptr() == model.model.norm.weight.data_ptr()
        assert not source.read("model.norm.weight").requires_grad
        assert source.label == "the weights in memory"
    assert open_source(model).config["hidden_size"] == 8


def test_the_marker_of_compiled_submodules_is_taken_off_names():
    source = open_source({"_orig_mod.layers.0._orig_mod.weight": torch.ones(1)})
    assert source.names == ("layers.0.weight",)


def test_tied_tensors_in_memory_are_held_once_and_parts_of_one_storage_are_not_tied():
    buffer = torch.arange(8.0)
    one, other = buffer[:4], buffer[4:]
    source = open_source({"a": one, "b": one, "c": other, "d": other.view(2, 2)})
    assert source.names == ("a", "c", "d")
    assert source.tied == {"b": "a"}


def test_empty_tensors_are_not_taken_for_tied():
    assert open_source({"a": torch.empty(0), "b": torch.empty(0)}).names == ("a", "b")


def test_a_state_dict_of_something_else_than_tensors_is_refused():
    with pytest.raises(SourceError, match=r"must map names to tensors; 'steps' is a int"):
        open_source({"w": torch.ones(1), "steps": 3})


def test_tensors_without_values_are_not_taken_for_tied():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert open_source(model).names == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_weights_without_values_are_refused_when_they_are_read():
    source = open_source(torch.nn.Linear(2, 2, device="meta"))
    assert source.shape("weight") == (2, 2)
    with pytest.raises(SourceError, match="weight of the weights in memory is on the meta device"):
        source.read("weight")


def test_a_source_in_memory_says_where_it_comes_from():
    assert StateDictSource(weights()).label == "the weights in memory"
    assert StateDictSource(weights(), Origin("here.ckpt")).label == "here.ckpt"


@pytest.mark.parametrize("attribute", ["origin", "location", "revision", "directory", "config", "tied", "parallel"])
def test_nothing_of_a_source_is_set_from_outside(attribute):
    with pytest.raises(AttributeError):
        setattr(open_source(weights()), attribute, None)


PARTS = [
    (slice(1, 3), slice(0, 4)),
    (slice(2, None),),
    (slice(-2, None), slice(None)),
    (slice(0, 5), slice(1, 3)),
    (slice(0, 5, 2), slice(0, 4)),
    (slice(3, 3), slice(0, 4)),
    (slice(0, 0), slice(0, 0)),
    None,
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_of_a_tensor_is_that_of_the_tensor_in_every_kind_of_source(tmp_path, part):
    left, right = torch.randint(-4, 5, (5, 2)).float(), torch.randint(-4, 5, (2, 4)).float()
    tensor = left @ right
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    torch.save({"w": tensor.T.contiguous().T}, tmp_path / "turned.pt")
    in_memory = open_source({"w": tensor})
    sources = [
        in_memory,
        open_source(tmp_path / "a.safetensors"),
        open_source(tmp_path / "turned.pt"),
        InFactors(in_memory, {"w": (left, right)}),
    ]
    for source in sources:
        found = source.read_slice("w", part)
        assert torch.equal(found, tensor if part is None else tensor[part])
        assert found.dtype == torch.float32


def test_rows_of_a_file_are_read_without_the_rest_of_it(tmp_path):
    save_file({"w": torch.arange(12.0).reshape(6, 2)}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    source.read = None
    assert source.read_slice("w", (slice(2, 4), slice(0, 2))).tolist() == [[4.0, 5.0], [6.0, 7.0]]
