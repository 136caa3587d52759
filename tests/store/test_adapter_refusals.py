"""Adapter directories that do not fit their start, or are damaged."""

import json

import peft
import pytest
import torch
from adapter_models import CONFIG, WEIGHTS, adapter, by_hand, change_config, close, refused
from architectures import loaded, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import llama, write_checkpoint

from lata_lightning import TaskVector
from lata_lightning.errors import BaseMismatchError, CorruptFileError, LataError, LayoutMismatchError, SourceError
from lata_lightning.store.opening import open_source


def test_a_wrapped_model_is_no_start(tmp_path):
    start, _, model = adapter(tmp_path)
    refused(model, start, SourceError, "give it as TUNED")
    # Peft changes the model it wraps.
    refused(model.get_base_model(), start, LataError, "get_peft_model")


def test_an_adapter_on_other_weights_than_the_start_is_refused(tmp_path):
    start, place, model = adapter(tmp_path, target_modules=["q_proj", "embed_tokens"])
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "elsewhere")
    refused(tmp_path / "elsewhere", place, BaseMismatchError, rf"trained on {start}.*Give {start} as START")
    refused(tmp_path / "elsewhere", model, BaseMismatchError, "carries other values of")
    # Without the name of its base, the embedding that is stored beside its factors tells.
    change_config(place, base_model_name_or_path=None)
    refused(tmp_path / "elsewhere", place, BaseMismatchError, r"carries other values of 1: \['model.embed_tokens.weight'\]")


def test_a_copy_of_the_start_is_as_good_as_the_start(tmp_path):
    start, place, _ = adapter(tmp_path)
    loaded("llama", start).save_pretrained(tmp_path / "copy")
    close(TaskVector.between(tmp_path / "copy", place), by_hand(start, place))
    change_config(place, base_model_name_or_path="someone/else")
    close(TaskVector.between(start, place), by_hand(start, place))


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    _, place, model = adapter(tmp_path)
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    change_config(place, base_model_name_or_path=None)
    refused(tmp_path / "gpt2", place, LayoutMismatchError, "cannot be put onto")
    refused(tmp_path / "gpt2", model, LayoutMismatchError, "adapts tensors that .* does not hold")
    llama().save_pretrained(tmp_path / "narrow")
    refused(tmp_path / "narrow", place, LayoutMismatchError, "same shapes|does not have the shapes")
    refused(tmp_path / "narrow", model, LayoutMismatchError, "same shapes")


def test_a_start_of_no_known_architecture_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path=None)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((start / "model.safetensors").read_bytes())
    refused(alone, place, SourceError, "architecture that transformers knows")
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "architectures": ["MadeUp"]}))
    refused(start, place, SourceError, "architecture that transformers knows")


@pytest.mark.parametrize("key", ["lora_A", "lora_B", "lm_head"])
def test_an_adapter_file_that_lacks_tensors_is_refused(tmp_path, key):
    start, place, _ = adapter(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    held = load_file(place / WEIGHTS)
    gone = next(name for name in held if key in name)
    save_file({name: tensor for name, tensor in held.items() if name != gone}, place / WEIGHTS)
    refused(start, place, CorruptFileError, f"lacks tensors that its config asks for, 1: .*{key}")


def test_an_adapter_file_without_its_trained_biases_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path, "bert", target_modules=["query"], bias="lora_only")
    held = load_file(place / WEIGHTS)
    save_file({name: tensor for name, tensor in held.items() if not name.endswith("bias")}, place / WEIGHTS)
    refused(start, place, CorruptFileError, r"lacks tensors that its config asks for, 2: .*bias")


def test_an_adapter_file_with_foreign_tensors_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    held = load_file(place / WEIGHTS)
    save_file({**held, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(3, 16)}, place / WEIGHTS)
    refused(start, place, LayoutMismatchError, r"that the model of .* does not have, 1: \['base_model.model.model.layers.7")
    save_file({**held, next(iter(held)): torch.zeros(2, 2)}, place / WEIGHTS)
    refused(start, place, LayoutMismatchError, "does not have the shapes")


def test_an_adapter_file_that_is_cut_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    content = (place / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(content[:-10])
    refused(start, place, CorruptFileError, "no readable safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[1]", "must hold a JSON object, it holds a list"), ("\xff", "no JSON"), ("", "no JSON")],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, message):
    start, place, _ = adapter(tmp_path)
    (place / CONFIG).write_bytes(text.encode("latin-1"))
    refused(start, place, CorruptFileError, message)
    with pytest.raises(CorruptFileError, match=message):
        open_source(place)


@pytest.mark.parametrize(
    "change",
    [{"r": "three"}, {"r": -1}, {"target_modules": "("}, {"rank_pattern": [1]}, {"lora_alpha": None}],
    ids=str,
)
def test_a_config_that_peft_cannot_use_is_refused(tmp_path, change):
    start, place, _ = adapter(tmp_path)
    change_config(place, **change)
    refused(start, place, LayoutMismatchError, "cannot be put onto|no config that peft can use")


def test_a_config_without_a_kind_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, peft_type=None)
    refused(start, place, SourceError, "of the type None, which this release of peft does not know")


def test_a_base_that_is_no_text_or_itself_an_adapter_is_refused(tmp_path):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path=5)
    refused(start, place, CorruptFileError, "must name its base model by a text, it holds 5")
    change_config(place, base_model_name_or_path=str(place))
    with pytest.raises(SourceError, match="names another adapter as its base"):
        open_source(place)
    change_config(place, base_model_name_or_path=None)
    with pytest.raises(SourceError, match="names no base_model_name_or_path"):
        open_source(place)


def test_the_hub_is_not_asked_about_an_adapter_on_local_weights(tmp_path, monkeypatch):
    start, place, _ = adapter(tmp_path)
    change_config(place, base_model_name_or_path="someone/else")

    def refuse(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", refuse)
    close(TaskVector.between(start, place), by_hand(start, place))


def test_the_checkpoint_of_a_wrapped_model_is_refused(tmp_path):
    start, _, model = adapter(tmp_path)
    path = write_checkpoint(tmp_path / "last.ckpt", model.state_dict(), prefix="model.")
    refused(start, path, SourceError, "wrapped by peft.*save_pretrained")
