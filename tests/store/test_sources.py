import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama, same_bits, tied_to_embedding, weights, write_checkpoint, write_model

from lata_lightning.errors import CorruptFileError, LayoutMismatchError, SourceError
from lata_lightning.store.hashing import content_hash, hash_stored, hash_values
from lata_lightning.store.opening import open_source
from lata_lightning.store.pairing import named_like, pair
from lata_lightning.store.sources import Origin, StateDictSource
from lata_lightning.store.views import Fingerprinted, View
from lata_lightning.store.weight_files import shard_files


def contents(source):
    return {name: source.read(name) for name in source.names}


def identity(source):
    return content_hash({name: hash_values(source.read(name)) for name in source.names})


# Reading


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


def test_a_lightning_checkpoint_gives_the_tensors_of_its_state_dict(tmp_path):
    source = open_source(write_checkpoint(tmp_path / "last.ckpt", weights()))
    assert same_bits(contents(source), {"model." + name: tensor for name, tensor in weights().items()})
    assert source.location == str(tmp_path / "last.ckpt")


def test_a_module_and_its_state_dict_are_sources_that_share_memory():
    model = llama(0)
    for source in (open_source(model), open_source(model.state_dict())):
        assert same_bits(contents(source), model.state_dict())
        assert source.read("model.norm.weight").data_ptr() == model.model.norm.weight.data_ptr()
        assert not source.read("model.norm.weight").requires_grad
        assert source.label == "the weights in memory"
    assert open_source(model).config["hidden_size"] == 8


def test_a_source_is_opened_as_itself():
    source = open_source(weights())
    assert open_source(source) is source


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


# Identities


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


def test_a_fingerprint_is_taken_once_while_a_tensor_is_read():
    source = Fingerprinted(open_source(weights()))
    assert source.hashes == {}
    source.read("model.norm.weight")
    source.read("model.norm.weight")
    assert source.hashes == {"model.norm.weight": hash_values(weights()["model.norm.weight"])}


# Pairing


def test_a_view_has_other_names_for_the_same_tensors():
    view = View(open_source({"a": torch.ones(2, 3)}), {"b": "a"})
    assert (view.names, view.shape("b"), view.dtype("b"), view.read("b").sum().item()) == (("b",), (2, 3), torch.float32, 6.0)


@pytest.mark.parametrize("side", ["start", "tuned"])
def test_the_module_prefix_of_either_side_is_taken_off(side):
    prefixed = {"student." + name: tensor for name, tensor in weights().items()} | {"loss.weight": torch.ones(3)}
    sides = [open_source(prefixed), open_source(weights())]
    start, tuned = pair(*(sides if side == "start" else reversed(sides)))
    assert set(start.names) == set(tuned.names) == set(weights())
    assert same_bits(contents(start), contents(tuned))


def test_two_checkpoints_with_one_prefix_pair_under_it(tmp_path):
    sides = [open_source(write_checkpoint(tmp_path / f"{name}.ckpt", weights())) for name in "ab"]
    start, tuned = pair(*sides)
    assert start.names == tuned.names == tuple("model." + name for name in weights())


def test_a_checkpoint_that_holds_the_model_twice_is_refused_rather_than_guessed():
    both = {prefix + name: tensor for prefix in ("teacher.", "student.") for name, tensor in weights().items()}
    with pytest.raises(
        LayoutMismatchError, match=r"hold the model once; .* under each of 2: \['student.', 'teacher.'\]. Say which is meant: --model NAME"
    ):
        pair(open_source(weights()), open_source(both))


def test_tied_tensors_go_by_the_name_that_the_other_side_has():
    embedding = torch.ones(2, 2)
    source = open_source({"net.head.weight": embedding, "net.embed.weight": embedding, "net.w": torch.zeros(1)})
    named = named_like(source, open_source({"embed.weight": torch.zeros(2, 2), "w": torch.zeros(1)}))
    assert set(named.names) == {"embed.weight", "w"}
    assert torch.equal(named.read("embed.weight"), embedding)


@pytest.mark.parametrize("config_on", ["start", "tuned"])
def test_a_copy_of_tied_weights_on_one_side_counts_once(tmp_path, config_on):
    twice = write_model(tmp_path / "twice", tied_to_embedding(weights(), twice=True), config={"tie_word_embeddings": config_on == "start"})
    once = write_model(tmp_path / "once", tied_to_embedding(weights(), twice=False), config={"tie_word_embeddings": config_on == "tuned"})
    start, tuned = pair(open_source(twice), open_source(once))
    assert set(start.names) == set(tuned.names) == set(weights()) - {"lm_head.weight"}


def test_a_copy_of_a_tensor_is_no_tied_weight_where_no_config_says_so(tmp_path):
    twice = write_model(tmp_path / "twice", tied_to_embedding(weights(), twice=True))
    once = write_model(tmp_path / "once", tied_to_embedding(weights(), twice=False))
    with pytest.raises(LayoutMismatchError, match=r"on one side only are 1: \['lm_head.weight'\]"):
        pair(open_source(twice), open_source(once))


def test_sides_of_another_architecture_vocabulary_or_shape_are_refused():
    with pytest.raises(
        LayoutMismatchError, match=r"must hold the same tensors; on one side only are 2: \['a', 'b'\]. Are both of one architecture"
    ):
        pair(open_source({"a": torch.ones(1)}), open_source({"b": torch.ones(1)}))
    with pytest.raises(LayoutMismatchError, match=r"same vocabulary; lm_head.weight has 3 rows in one and 4 in the other"):
        pair(open_source({"lm_head.weight": torch.ones(3, 2)}), open_source({"lm_head.weight": torch.ones(4, 2)}))
    with pytest.raises(LayoutMismatchError, match=r"different are 1: \['w'\], w with \(2, 3\) and \(3, 2\)"):
        pair(open_source({"w": torch.ones(2, 3)}), open_source({"w": torch.ones(3, 2)}))


def test_quantised_weights_are_refused():
    with pytest.raises(LayoutMismatchError, match=r"integers on one side only are 1: \['w'\]. Is one of them quantised"):
        pair(open_source({"w": torch.ones(2, dtype=torch.int8)}), open_source({"w": torch.ones(2)}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_no_difference_can_be_taken_of_are_refused(dtype):
    odd = {"w": torch.ones(2).to(dtype)}
    with pytest.raises(SourceError, match=r"plain floating or integer tensors; other dtypes have 1: \['w'\]"):
        pair(open_source(odd), open_source(odd))


# Refusals


def test_a_path_that_is_nothing_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(SourceError, match="does not exist: expected a model directory, a file with weights"):
        open_source(tmp_path / "nothing" / "here" / "at all")


def test_a_hub_id_that_cannot_be_had_offline_is_refused_in_one_line():
    with pytest.raises(SourceError, match="nobody/no-such-model is no local directory and could not be had from the hub"):
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


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds no model.safetensors and no pytorch_model.bin, nor an index of either. Is it complete"):
        open_source(tmp_path)


def test_a_directory_of_other_files_names_them(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=r"Its other files are 1: \['weights.pt'\]: give the one you mean"):
        open_source(tmp_path)


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
    with pytest.raises(CorruptFileError, match="may only name safetensors files beside it"):
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


def test_a_source_in_memory_says_where_it_comes_from():
    assert StateDictSource(weights()).label == "the weights in memory"
    assert StateDictSource(weights(), Origin("here.ckpt")).label == "here.ckpt"
