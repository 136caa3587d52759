import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lata_lightning.errors import CorruptFileError, LataError, SourceError
from lata_lightning.store.head_files import Head
from lata_lightning.store.seal import sealed

TENSORS = {"score.weight": torch.arange(6.0).view(2, 3), "score.bias": torch.tensor([1, 2], dtype=torch.bfloat16)}


def head(**more):
    return Head(TENSORS, "bert", "BertForSequenceClassification", 2, **more)


@pytest.mark.parametrize("labels", [("no", "yes"), None])
def test_a_head_is_read_back_as_it_was_saved(tmp_path, labels):
    head(labels=labels, start="models/plain").save(tmp_path)
    found, stored = Head.open(tmp_path), load_file(tmp_path / "head.safetensors")
    assert (found.model_type, found.architecture, found.count) == ("bert", "BertForSequenceClassification", 2)
    assert (found.labels, found.start) == (labels, "models/plain")
    for name, tensor in TENSORS.items():
        assert torch.equal(found.tensors[name], tensor)
        assert torch.equal(stored[name], tensor)
        assert found.tensors[name].dtype == stored[name].dtype == tensor.dtype
    assert {path.name for path in tmp_path.iterdir()} == {"head.safetensors", "head.json"}


def test_a_directory_without_a_head_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(SourceError, match=r"it lacks head.safetensors and head.json. Name the folder"):
        Head.open(tmp_path)
    head().save(tmp_path)
    (tmp_path / "head.json").unlink()
    with pytest.raises(SourceError, match=r"it lacks head.json\."):
        Head.open(tmp_path)


def test_files_that_were_edited_or_do_not_belong_together_are_refused(tmp_path):
    head().save(tmp_path)
    text = (tmp_path / "head.json").read_text()
    (tmp_path / "head.json").write_text(text.replace('"bert"', '"gpt2"'))
    with pytest.raises(CorruptFileError, match="was edited"):
        Head.open(tmp_path)
    (tmp_path / "head.json").write_text(text)
    save_file(TENSORS | {"score.weight": torch.zeros(2, 3)}, tmp_path / "head.safetensors")
    with pytest.raises(CorruptFileError, match=re.escape("other than described are 1: ['score.weight']")):
        Head.open(tmp_path)


def test_a_later_format_and_a_description_that_lacks_entries_are_refused(tmp_path):
    head().save(tmp_path)
    data = {key: value for key, value in json.loads((tmp_path / "head.json").read_text()).items() if key != "self_hash"}
    (tmp_path / "head.json").write_text(sealed({**data, "format_version": 2}))
    with pytest.raises(SourceError, match="is of version 2, this release reads up to 1"):
        Head.open(tmp_path)
    (tmp_path / "head.json").write_text(sealed({key: value for key, value in data.items() if key != "num_labels"}))
    with pytest.raises(CorruptFileError, match="describes no head"):
        Head.open(tmp_path)


def test_an_encoder_of_another_family_is_refused():
    head().check_model("bert", "M")
    with pytest.raises(LataError, match="the head of a bert model does not fit M, which is a gpt2 model"):
        head().check_model("gpt2", "M")
