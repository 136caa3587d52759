import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from lata_lightning.errors import LataError
from lata_lightning.evaluation.heads import scored_with, with_head
from lata_lightning.store.head_files import Head

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.tensor([[1, 2, 3]])


def classifier(count, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(num_labels=count, **SIZES)).eval()


def head_of(model, **more):
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.startswith("classifier")}
    return Head(tensors, "bert", type(model).__name__, model.config.num_labels, **more)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_model_with_a_head_of_any_number_of_classes_gives_what_transformers_gives_with_it(count):
    model, other = classifier(3), classifier(count, seed=1)
    head = head_of(other)
    other.bert.load_state_dict(model.bert.state_dict())
    before = logits(model)
    with with_head(model, head):
        assert torch.equal(logits(model), logits(other))
        assert model.config.num_labels == count
    assert torch.equal(logits(model), before)
    assert model.config.num_labels == 3


def test_classes_have_the_names_of_the_head_and_numbers_as_words_without():
    model = classifier(2)
    assert scored_with(head_of(model, labels=("no", "yes")), lambda it: it.config.label2id)(model) == {"no": 0, "yes": 1}
    assert scored_with(head_of(model), lambda it: it.config.id2label)(model) == {0: "0", 1: "1"}
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_head_of_another_kind_or_width_is_refused_and_changes_nothing():
    model = classifier(2)
    before = logits(model)
    torch.manual_seed(0)
    tagger = BertForTokenClassification(BertConfig(num_labels=2, **SIZES))
    with (
        pytest.raises(LataError, match="head of a BertForTokenClassification does not fit a BertForSequenceClassification"),
        with_head(model, head_of(tagger)),
    ):
        pass
    wide = BertForSequenceClassification(BertConfig(num_labels=2, **{**SIZES, "hidden_size": 12}))
    with (
        pytest.raises(LataError, match=r"does not fit M, which lacks .*1: \['classifier.weight \(2, 12\)'\]"),
        with_head(model, head_of(wide), "M"),
    ):
        pass
    assert torch.equal(logits(model), before)
