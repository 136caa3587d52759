import pytest
import torch
from tokenizers_of_kinds import bert, chatml
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lata_lightning.errors import LataError
from lata_lightning.evaluation.classification import Accuracy, label_numbers
from lata_lightning.rows.schema import Sample

TEXTS = ["a", "some words", "quite a long text, really", "b", "four", "x y z"]


def encoder(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.8}
    return BertForSequenceClassification(BertConfig(vocab_size=270, pad_token_id=256, num_labels=3, **sizes, **more)).eval()


def decoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.8}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=270, num_labels=3, pad_token_id=None, **sizes)).eval()


def predicted(model, tokenizer):
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in TEXTS]


@pytest.mark.parametrize(("make", "kind"), [(encoder, bert), (decoder, chatml)])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_accuracy_is_that_of_one_text_at_a_time(make, kind, tokens):
    model, tokenizer = make(), kind()
    right = predicted(model, tokenizer)
    wrong = [*right[:2], *((label + 1) % 3 for label in right[2:])]
    for labels, share in ((right, 1.0), (wrong, 2 / 6)):
        samples = [Sample("text", text=text, label=label) for text, label in zip(TEXTS, labels, strict=True)]
        assert Accuracy(tokenizer, samples, tokens)(model) == pytest.approx(share)


def test_words_are_the_classes_that_the_config_names():
    config = encoder(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2}).config
    assert label_numbers(["yes", "no", "yes"], config, "x") == [1, 0, 1]
    with pytest.raises(LataError, match=r"labels of x must be classes of the model, which are 3: .*; others are 1: \['perhaps'\]"):
        label_numbers(["yes", "perhaps"], config, "x")


def test_words_are_numbered_in_order_where_the_config_names_none_and_all_are_there():
    config = encoder().config
    assert label_numbers(["b", "c", "a"], config, "x") == [1, 2, 0]
    with pytest.raises(LataError, match=r"others are 2: \['a', 'b'\]"):
        label_numbers(["a", "b"], config, "x")


def test_numbers_beyond_the_classes_are_refused():
    assert label_numbers([2, 0], encoder().config, "x") == [2, 0]
    with pytest.raises(LataError, match=r"must lie in 0 to 2, the classes of the model; others are 2: \['-1', '3'\]"):
        label_numbers([3, -1, 3], encoder().config, "x")


def test_rows_without_a_label_and_labels_of_two_types_are_refused():
    with pytest.raises(LataError, match=r"needs rows with 'text' and 'label'; in x it is missing in 1: \['row 2'\]"):
        Accuracy(bert(), [Sample("text", text="a", label=1), Sample("text", text="b")], name="x")
    with pytest.raises(LataError, match="all be words or all be whole numbers"):
        Accuracy(bert(), [Sample("text", text="a", label=1), Sample("text", text="b", label="c")])
    with pytest.raises(LataError, match="at least one text and one token a batch, not 0 and 4096"):
        Accuracy(bert(), [])


def test_the_model_keeps_its_mode():
    model = encoder().train()
    Accuracy(bert(), [Sample("text", text="a", label=0)])(model)
    assert model.training
