import pytest
import torch
from tiny_models import weights, write_checkpoint, write_model

from lata_lightning.store.hashing import content_hash, hash_stored, hash_values
from lata_lightning.store.opening import open_source


def identity(source):
    return content_hash({name: hash_values(source.read(name)) for name in source.names})


def test_the_same_values_have_one_identity_in_every_file_layout_and_precision(tmp_path):
    # Values that bfloat16 holds exactly.
    values = weights(dtype=torch.bfloat16)
    full = {name: tensor.float() for name, tensor in values.items()}
    reversed_order = dict(reversed(list(full.items())))
    write_checkpoint(tmp_path / "c.ckpt", full, prefix="")
    sources = [
        open_source(write_model(tmp_path / "float32", full)),
        open_source(write_model(tmp_path / "bfloat16", values)),
        open_source(write_model(tmp_path / "sharded", full, shards=3)),
        open_source(write_model(tmp_path / "sharded bfloat16", values, shards=2)),
        open_source(tmp_path / "c.ckpt"),
        open_source(reversed_order),
    ]
    assert len({identity(source) for source in sources}) == 1


@pytest.mark.parametrize("change", ["value", "name", "shape", "swap"])
def test_other_values_names_or_places_have_another_identity(change):
    other = weights()
    if change == "value":
        other["model.norm.weight"][0] += 2**-20
    elif change == "name":
        other["model.norm.bias"] = other.pop("model.norm.weight")
    elif change == "shape":
        del other["lm_head.weight"]
    else:
        first, second = (f"model.layers.{index}.mlp.up_proj.weight" for index in range(2))
        other[first], other[second] = other[second], other[first]
    assert identity(open_source(other)) != identity(open_source(weights()))


def test_names_cannot_be_spliced_into_one_another_in_a_content_hash():
    assert content_hash({"a": "x", "b": "y"}) != content_hash({"a=x\nb": "y"})
    assert content_hash({"a": "x", "b": "y"}) == content_hash({"b": "y", "a": "x"})


def test_the_hash_of_a_tensor_is_the_blake3_of_its_bytes_in_little_endian():
    # BLAKE3 of nothing, from its specification; of other bytes by way of struct.
    import struct

    from blake3 import blake3

    assert hash_stored(torch.empty(0)) == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hash_stored(torch.tensor([1.5, -2.0])) == "blake3:" + blake3(struct.pack("<2f", 1.5, -2.0)).hexdigest()
    assert hash_stored(torch.tensor([[1, 2], [3, 4]]).t()) == "blake3:" + blake3(struct.pack("<4q", 1, 3, 2, 4)).hexdigest()
    assert hash_values(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)) == hash_stored(torch.tensor([1.5, -2.0]))
    assert hash_values(torch.tensor([0.1], dtype=torch.float64)) != hash_values(torch.tensor([0.1]))
