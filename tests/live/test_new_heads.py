import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lata_lightning.live.adapters import look_at
from lata_lightning.live.new_heads import NO_HEAD, new_head

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 20, **SIZES}
LLAMA = {**TEXT, "num_key_value_heads": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def live(auto, directory, count):
    return look_at(auto.from_pretrained(directory, num_labels=count, ignore_mismatched_sizes=True))


@pytest.mark.parametrize(
    ("start", "auto", "modules", "beside"),
    [
        (lambda: BertModel(BertConfig(**TEXT)), AutoModelForSequenceClassification, {"classifier"}, set()),
        (lambda: BertForMaskedLM(BertConfig(**TEXT)), AutoModelForSequenceClassification, {"bert.pooler", "classifier"}, {"cls"}),
        (lambda: BertForSequenceClassification(BertConfig(num_labels=3, **TEXT)), AutoModelForSequenceClassification, {"classifier"}, {"classifier"}),
        (lambda: RobertaModel(RobertaConfig(**TEXT)), AutoModelForSequenceClassification, {"classifier"}, {"pooler"}),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), AutoModelForSequenceClassification, {"score"}, {"lm_head"}),
        (lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)), ViTForImageClassification, {"classifier"}, {"pooler"}),
    ],
    ids=["encoder", "masked", "other size", "encoder with a pooler", "decoder", "image"],
)  # fmt: skip
def test_what_transformers_reports_as_new_is_the_head_whatever_the_start(tmp_path, start, auto, modules, beside):
    torch.manual_seed(0)
    start().save_pretrained(tmp_path)
    _, report = auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    model = live(auto, tmp_path, 5)
    head = new_head(model)
    assert set(head.names) == {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    assert set(head.modules(model.names)) == modules
    assert {name.split(".")[0] for name in head.beside} == beside
    matching = [re.compile(pattern) for pattern in head.patterns]
    assert all(any(pattern.search(name) for pattern in matching) for name in (*head.names, *head.beside))
    assert not any(pattern.search(name) for pattern in matching for name in set(model.names) - set(head.names))


def test_a_stored_head_is_not_new(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=3, **TEXT)).save_pretrained(tmp_path)
    assert new_head(live(AutoModelForSequenceClassification, tmp_path, 3)) == NO_HEAD


def test_models_that_are_no_classifiers_or_have_no_start_have_no_new_head(tmp_path):
    assert new_head(look_at(nn.Linear(2, 2))) == NO_HEAD
    assert new_head(look_at(LlamaForCausalLM(LlamaConfig(**LLAMA)))) == NO_HEAD
    assert new_head(look_at(BertForSequenceClassification(BertConfig(num_labels=3, **TEXT)))) == NO_HEAD


def test_a_start_that_cannot_be_read_is_said(tmp_path):
    model = BertForSequenceClassification(BertConfig(num_labels=3, **TEXT))
    model.config._name_or_path = str(tmp_path / "gone")
    head = new_head(look_at(model))
    assert head.names == ()
    assert "it cannot be told whether the head is new" in head.describe()


def test_other_tokens_are_no_head(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=3, **TEXT)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.resize_token_embeddings(24)
    assert new_head(look_at(model)) == NO_HEAD
