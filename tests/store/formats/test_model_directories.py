import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import llama, same_bits, weights, write_model

from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.inspection import describe

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def contents(source):
    return {name: source.read(name) for name in source.names}


def loaded(directory):
    return dict(transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict())


def same_as_transformers(directory):
    assert same_bits(contents(open_source(directory)), loaded(directory))


def write_pickled(directory, tensors, shards=1, config=None):
    directory.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-{index % shards + 1:05d}-of-{shards:05d}.bin" for index, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, directory / file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "made-up"}))
    return directory


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return model


# What transformers loads


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_directory_is_read_whole_or_in_shards(tmp_path, shards):
    model = llama(0)
    directory = write_pickled(tmp_path / "m", dict(model.state_dict()), shards, model.config.to_dict())
    same_as_transformers(directory)
    assert open_source(directory).config["hidden_size"] == 8
    assert describe(directory)["format"] == f"model directory, pickled, {'one file' if shards == 1 else '3 shards'}"


def test_a_model_saved_in_one_file_over_an_older_one_in_shards_is_read(tmp_path):
    llama(0).save_pretrained(tmp_path, max_shard_size="1KB")
    changed(llama(0)).save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists()
    same_as_transformers(tmp_path)


def test_a_model_saved_in_shards_over_an_older_one_in_one_file_is_refused(tmp_path):
    llama(0).save_pretrained(tmp_path)
    changed(llama(0)).save_pretrained(tmp_path, max_shard_size="1KB")
    # transformers goes on loading the old file.
    assert torch.equal(loaded(tmp_path)["model.norm.weight"], llama(0).model.norm.weight)
    with pytest.raises(CorruptFileError, match="must hold one set of weights"):
        open_source(tmp_path)


def test_shards_of_another_number_that_are_left_over_do_not_matter(tmp_path):
    model = llama(0)
    model.save_pretrained(tmp_path / "old", max_shard_size="2KB")
    changed(model).save_pretrained(tmp_path / "new", max_shard_size="1KB")
    for file in (tmp_path / "old").glob("model-*"):
        assert not (tmp_path / "new" / file.name).exists()
        shutil.copy(file, tmp_path / "new")
    same_as_transformers(tmp_path / "new")


def test_an_index_that_lists_the_single_file_is_no_second_set(tmp_path):
    llama(0).save_pretrained(tmp_path)
    names = load_file(tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)}))
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "\x00", '{"weight_map": 3}'])
def test_an_index_that_nobody_reads_does_not_matter(tmp_path, text):
    llama(0).save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(text)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("kept", [0, 1])
def test_what_is_left_of_older_shards_does_not_matter(tmp_path, kept):
    llama(0).save_pretrained(tmp_path / "old", max_shard_size="1KB")
    changed(llama(0)).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "old" / INDEX, tmp_path / "new")
    for file in sorted((tmp_path / "old").glob("model-*"))[:kept]:
        shutil.copy(file, tmp_path / "new")
    same_as_transformers(tmp_path / "new")


def test_pickled_weights_beside_safetensors_do_not_matter(tmp_path):
    llama(0).save_pretrained(tmp_path)
    torch.save(dict(changed(llama(0)).state_dict()), tmp_path / "pytorch_model.bin")
    same_as_transformers(tmp_path)


def test_the_weights_of_an_optimizer_beside_them_do_not_matter(tmp_path):
    llama(0).save_pretrained(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "model.fp16.safetensors"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    same_as_transformers(tmp_path)


def test_the_file_that_the_config_names_is_read(tmp_path):
    llama(0).save_pretrained(tmp_path)
    other = changed(llama(0))
    save_file({name: tensor.contiguous() for name, tensor in other.state_dict().items()}, tmp_path / "other.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    same_as_transformers(tmp_path)
    assert torch.equal(open_source(tmp_path).read("model.norm.weight"), other.model.norm.weight)
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "../other.safetensors"}))
    with pytest.raises(CorruptFileError, match="must name a file in its directory"):
        open_source(tmp_path)


@pytest.mark.parametrize("shards", [2, 3])
def test_a_tensor_that_two_shards_hold_alike_counts_once(tmp_path, shards):
    model = llama(0)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    one, *_, other = sorted(tmp_path.glob("model-*"))
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(other), name: tensor}, other, {"format": "pt"})
    same_as_transformers(tmp_path)


# Conflicts


def test_two_whole_sets_of_weights_are_refused_by_name(tmp_path):
    llama(0).save_pretrained(tmp_path / "old", max_shard_size="1KB")
    changed(llama(0)).save_pretrained(tmp_path / "new")
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, tmp_path / "new")
    with pytest.raises(
        CorruptFileError, match=rf"must hold one set of weights; it holds {SINGLE} and the .* shards of {INDEX}.*model-00001.*remove that"
    ):
        open_source(tmp_path / "new")


def test_two_whole_sets_of_pickled_weights_are_refused(tmp_path):
    directory = write_pickled(tmp_path / "m", weights(), 2)
    torch.save(weights(1), directory / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match=r"it holds pytorch_model.bin and the 2 shards of pytorch_model.bin.index.json"):
        open_source(directory)


@pytest.mark.parametrize("write", [write_model, write_pickled], ids=["safetensors", "pickled"])
def test_a_tensor_that_two_shards_hold_with_other_values_is_refused(tmp_path, write):
    directory = write(tmp_path / "m", weights(), shards=2)
    one, other = sorted(directory.glob("*-of-*"))
    load, save = (load_file, save_file) if write is write_model else (lambda file: torch.load(file, weights_only=True), torch.save)
    name, tensor = next(iter(load(one).items()))
    save({**load(other), name: tensor + 1}, other)
    with pytest.raises(CorruptFileError, match=rf"must hold the same values of each tensor; they differ in 1: \['{name}'\]"):
        open_source(directory)
    save({**load(other), name: tensor[:1]}, other)
    with pytest.raises(CorruptFileError, match="must hold the same values of each tensor"):
        open_source(directory)


def test_a_vector_with_two_sets_of_differences_is_refused(tmp_path):
    from lata_lightning import TaskVector

    vector = TaskVector.between(weights(0), weights(1))
    vector.save(tmp_path / "v", max_shard_bytes=150)
    vector.save(tmp_path / "w")
    shutil.copy(tmp_path / "w/delta.safetensors", tmp_path / "v")
    with pytest.raises(CorruptFileError, match=r"it holds delta.safetensors and the \d shards of delta.safetensors.index.json"):
        TaskVector.open(tmp_path / "v")
    for file in list((tmp_path / "v").glob("delta-*"))[1:]:
        file.unlink()
    assert TaskVector.open(tmp_path / "v")["model.norm.weight"].shape == (4,)


# Other layouts of directories


@pytest.mark.parametrize("name", ["lit_model.pth", "consolidated.00.pth", "consolidated.safetensors"])
def test_directories_of_other_programs_are_read(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(weights(), tmp_path / name)
    assert same_bits(contents(open_source(tmp_path)), weights())
    assert same_bits(contents(open_source(tmp_path / name)), weights())


def test_parts_that_are_split_for_tensor_parallelism_are_refused_as_such(tmp_path):
    for number in range(2):
        torch.save(weights(), tmp_path / f"consolidated.{number:02d}.pth")
    for path in (tmp_path, tmp_path / "consolidated.01.pth"):
        with pytest.raises(SourceError, match="holds a part of every matrix, split for tensor parallelism"):
            open_source(path)


def test_a_directory_of_variants_names_them(tmp_path):
    llama(0).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(SourceError, match=r"Its other files are 1: \['model.fp16.safetensors'\]: give the one you mean"):
        open_source(tmp_path)
    assert same_bits(contents(open_source(tmp_path / "model.fp16.safetensors")), dict(llama(0).state_dict()))


@pytest.mark.parametrize("folder", ["checkpoint-500", "0_Transformer", "text_encoder"])
def test_a_directory_whose_weights_are_in_a_folder_names_the_folder(tmp_path, folder):
    llama(0).save_pretrained(tmp_path / folder)
    torch.save({}, tmp_path / "training_args.bin")
    with pytest.raises(SourceError, match=rf"Folders in it hold weights, 1: \['{folder}'\]: give the one you mean"):
        open_source(tmp_path)
    assert same_bits(contents(open_source(tmp_path / folder)), dict(llama(0).state_dict()))


def test_a_hub_repository_of_pickled_weights_only_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot, asked = tmp_path / "snapshots" / "0123abc", []

    def download(hub_id, ignore_patterns):
        asked.append(any(fnmatch("pytorch_model.bin", pattern) for pattern in ignore_patterns))
        if not asked[-1]:
            write_pickled(snapshot, weights())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("org/name")
    assert same_bits(contents(source), weights())
    assert source.revision == "0123abc"
    assert asked == [True, False]
