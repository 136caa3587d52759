"""What goes along with the weights of a merged model, and what stays behind by name."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama, weights

from lata_lightning.cli.main import main
from lata_lightning.errors import CorruptFileError, SourceError
from lata_lightning.merging.merge import Term, merge
from lata_lightning.store.companions import companions_of
from lata_lightning.store.model_directory import verify_merged
from lata_lightning.store.opening import open_source
from lata_lightning.vectors.task_vector import TaskVector

ALONG = [
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "additional_chat_templates/tool_use.jinja", "source.spm", "bpe.codes",
    "LICENSE", "NOTICE.md", "modeling_own.py", "vocab.txt", "assets/logo.png", "deep/er/file",
]  # fmt: skip
BEHIND = [
    "pytorch_model.bin", "model.fp16.safetensors", "model-q4.gguf", "optimizer.pt", "trainer_state.json", "README.md", "merge.json", ".gitattributes",
]  # fmt: skip
FOLDERS = ["onnx", "checkpoint-500", ".git", "original", "runs"]


def fill(directory):
    for name in (*ALONG, *BEHIND, *(f"{folder}/file.json" for folder in FOLDERS)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    save_file({"linear.weight": torch.ones(2, 2)}, directory / "2_Dense/model.safetensors")
    return directory


@pytest.fixture
def model(tmp_path):
    llama(0).save_pretrained(tmp_path / "model")
    return fill(tmp_path / "model")


def merged(onto, output, **options):
    tuned = {name: tensor + 1 for name, tensor in llama(0).state_dict().items()}
    return merge(onto, [Term(TaskVector.between(llama(0).state_dict(), tuned))], output, **options)


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_everything_but_weights_and_records_goes_along_and_the_rest_is_named_once(model, tmp_path):
    said = []
    merged(model, tmp_path / "out", note=said.append)
    assert files(tmp_path / "out") == {
        *ALONG, "2_Dense/model.safetensors", "model.safetensors", "config.json", "generation_config.json", "README.md", "merge.json"
    }  # fmt: skip
    for name in (*ALONG, "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    (note,) = said
    assert note.startswith(f"not copied from {model}: ")
    left = {*BEHIND, *(f"{folder}/" for folder in FOLDERS)}
    assert set(note.split(": ", 1)[1].split(", ")) == left
    assert set(json.loads((tmp_path / "out/merge.json").read_text())["left_out"]) == left


def test_many_that_stay_behind_are_counted(model):
    for number in range(30):
        (model / f"part-{number}.onnx").write_text("")
    found = companions_of(open_source(model))
    assert found.note.endswith(f" and {len(found.left_out) - 20} more, which merge.json lists")


def test_a_directory_with_nothing_else_says_nothing(tmp_path):
    llama(0).save_pretrained(tmp_path / "model")
    said = []
    merged(tmp_path / "model", tmp_path / "out", note=said.append)
    assert said == []


def test_a_snapshot_of_the_hub_whose_files_are_links_becomes_files(tmp_path, model):
    snapshot, blobs = tmp_path / "cache/snapshots/0123", tmp_path / "cache/blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(files(model))):
        shutil.copyfile(model / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    merged(snapshot, tmp_path / "out")
    assert set(ALONG) < files(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_links_are_not_followed_out_of_the_directory(tmp_path, model):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("secret")
    (model / "key.txt").symlink_to(tmp_path / "secret/key.txt")
    (model / "folder").symlink_to(tmp_path / "secret")
    (model / "inside.txt").symlink_to(model / "LICENSE")
    (model / "round").symlink_to(model)
    (model / "dangling.txt").symlink_to(tmp_path / "nowhere")
    found = companions_of(open_source(model))
    assert {"key.txt", "folder/", "round/", "dangling.txt"} <= set(found.left_out)
    assert "inside.txt" in found.copied


def test_a_model_or_vector_in_a_folder_of_the_directory_stays_behind(tmp_path, model):
    for name, record in (("merged", "merge.json"), ("vector", "task_vector.json"), ("adapter", "adapter_config.json")):
        (model / name).mkdir()
        (model / name / record).write_text("{}")
    found = companions_of(open_source(model))
    assert {"merged/", "vector/", "adapter/"} <= set(found.left_out)
    # Also where it is the output itself, which is being written there.
    merged(model, model / "output")
    assert not (model / "output/output").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_all_the_weights_of_its_directory_takes_its_neighbours_along(tmp_path, name):
    llama(0).save_pretrained(tmp_path / "model")
    if name == "pytorch_model.bin":
        (tmp_path / "model/model.safetensors").unlink()
        torch.save(llama(0).state_dict(), tmp_path / "model" / name)
    (tmp_path / "model/LICENSE").write_text("free")
    merged(tmp_path / "model" / name, tmp_path / "out")
    assert {"config.json", "LICENSE", "model.safetensors"} < files(tmp_path / "out")


@pytest.mark.parametrize("where", ["alone", "beside other weights"])
def test_a_file_without_a_directory_of_its_own_says_that_only_weights_are_written(tmp_path, where):
    (tmp_path / "files").mkdir()
    file = tmp_path / "files/weights.safetensors"
    save_file(llama(0).state_dict(), file)
    if where != "alone":
        llama(0).save_pretrained(tmp_path / "files")
    said = []
    merged(file, tmp_path / "out", note=said.append)
    assert said == [
        f"{file} lies in no model directory of its own, so no config and no tokenizer come along: the output holds weights only"
    ]


def test_weights_in_memory_have_no_companions_and_say_nothing(tmp_path):
    said = []
    merged(llama(0).state_dict(), tmp_path / "out", note=said.append)
    assert said == []
    assert companions_of(open_source(weights())).copied == {}


def test_a_file_that_cannot_be_read_is_named_before_any_weights_are_written(tmp_path, model, monkeypatch):
    from pathlib import Path

    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match="LICENSE"):
        merged(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [float("inf"), {"__float__": "Infinity"}])
def test_a_config_with_infinite_numbers_is_written_as_it_was(tmp_path, value):
    llama(0).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "limit": [0.0, value]}))
    merged(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["limit"], written["dtype"]) == ([0.0, value], "bfloat16")


@pytest.mark.parametrize("key", ["terms", "command", "content_hash", "left_out"])
def test_verify_notices_an_edited_record_of_a_merge(tmp_path, model, key):
    path = merged(model, tmp_path / "out") / "merge.json"
    assert verify_merged(tmp_path / "out") == 21
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, key: "edited"}, indent=2) + "\n")
    with pytest.raises(CorruptFileError, match="merge.json was edited after it was written"):
        verify_merged(tmp_path / "out")
    # Records of earlier releases hold no hash of themselves.
    older = {name: value for name, value in record.items() if name not in ("format_version", "self_hash")}
    path.write_text(json.dumps(older))
    assert verify_merged(tmp_path / "out") == 21


def test_the_command_prints_the_note_on_standard_error(tmp_path, model, capsys):
    llama(1).save_pretrained(tmp_path / "tuned")
    assert main(["merge", str(model), str(tmp_path / "tuned"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert all(name in said for name in (*BEHIND, *FOLDERS))


# Modules with weights of their own, in folders


@pytest.mark.parametrize("start_has_it", [True, False])
@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"])
def test_modules_in_folders_that_a_tuned_model_trained_too_are_named(tmp_path, name, start_has_it, capsys):
    for number, directory in enumerate((tmp_path / "start", tmp_path / "tuned")):
        llama(number).save_pretrained(directory)
        (directory / name).parent.mkdir()
        if number or start_has_it:
            (directory / name).write_text(str(number))
    start, tuned, said = (
        str(tmp_path / "start"),
        str(tmp_path / "tuned"),
        rf"{tmp_path}/tuned has other weights in the folders of its directory, 1: ['{name}']",
    )
    for command, advice in (("merge", f"the output has those of {start}"), ("extract", "they are no part of the vector")):
        assert main([command, start, tuned, "--output", str(tmp_path / command)]) == 0
        assert f"{said}: {advice}" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "merge" / name).exists() == start_has_it


def test_equal_modules_in_folders_and_folders_of_the_start_alone_are_not_worth_a_note(tmp_path, capsys):
    for number, directory in enumerate((tmp_path / "start", tmp_path / "tuned")):
        llama(number).save_pretrained(directory)
        for name in (
            "2_Dense/model.safetensors",
            "checkpoint-5/model.safetensors",
            *(["3_Dense/model.safetensors"] if number == 0 else []),
        ):
            (directory / name).parent.mkdir()
            (directory / name).write_text("same" if name.startswith("2") else str(number))
    assert main(["extract", str(tmp_path / "start"), str(tmp_path / "tuned"), "--output", str(tmp_path / "v")]) == 0
    assert "in folders" not in capsys.readouterr().err


def test_companions_of_weights_in_memory_are_none(tmp_path):
    companions_of(open_source(weights())).copy_to(tmp_path)
    assert list(tmp_path.iterdir()) == []
