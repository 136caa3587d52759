"""A start model and vectors under the names of the model, whatever names they are stored under."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from lata_lightning import TaskVector, regress, solve_coefficients
from lata_lightning.linearity.start import open_start

SIZES = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def texts(seed):
    return [{"input_ids": torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(seed))}]


def encoder(seed=None):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES))
    return model if seed is None else moved(model, seed)


def test_a_model_stored_without_the_prefix_of_its_class_is_read_under_the_names_of_the_class(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    for name, seed in (("start", None), ("tuned", 1)):
        (model if seed is None else moved(model, seed)).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        save_file(bare, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    vector = TaskVector.between(tmp_path / "start", tmp_path / "tuned")
    opened = open_start(tmp_path / "start", [vector])
    stored = load_file(tmp_path / "start" / "model.safetensors")
    assert set(opened.weights.names) == {f"transformer.{name}" for name in stored}
    assert all(torch.equal(opened.weights.read(f"transformer.{name}"), tensor) for name, tensor in stored.items())
    assert torch.equal(opened.vectors[0].read("transformer.wte.weight"), vector["wte.weight"])
    assert opened.layers.positions["transformer.h.0.ln_1.weight"].block == "h.0"
    # A vector made of it has the names on disk again.
    assert set(regress([vector], tmp_path / "start", [texts(0)])) == set(stored)


def test_vectors_of_an_encoder_move_the_encoder_of_a_classifier_in_memory():
    classifier = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    classifier.bert.load_state_dict(encoder().state_dict())
    vectors = [TaskVector.between(encoder(), encoder(seed)) for seed in (1, 2)]
    samples = [texts(1), texts(2)]
    found, expected = (solve_coefficients(start, vectors, samples) for start in (classifier, encoder()))
    assert [vector.coefficients for vector in found.vectors] == [vector.coefficients for vector in expected.vectors]
    one, other = (regress(vectors, start, samples) for start in (classifier, encoder()))
    assert {name.removeprefix("bert."): tensor.tolist() for name, tensor in one.items()} == {
        name: tensor.tolist() for name, tensor in other.items()
    }


class Wrapped(nn.Module):
    """A model of its own around an encoder, as a LightningModule is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


def test_vectors_of_a_model_move_it_beneath_a_wrapper():
    vectors = [TaskVector.between(encoder(), encoder(seed)) for seed in (1, 2)]
    samples = [texts(1), texts(2)]
    found, expected = (regress(vectors, start, samples) for start in (Wrapped(encoder()).eval(), encoder()))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("first", [0, 1])
def test_coefficients_are_applied_to_vectors_with_and_without_a_prefix(first):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_labels=3)
    start, tuned = BertForSequenceClassification(config), moved(BertForSequenceClassification(config), 3)
    start.bert.load_state_dict(encoder().state_dict())
    vectors = [TaskVector.between(encoder(), encoder(1)), TaskVector.between(start, tuned, leave_out=["^classifier"])]
    vectors = [vectors[first], vectors[1 - first]]
    solution = solve_coefficients(encoder(), vectors, [texts(1), texts(2)])
    applied = solution.apply(vectors)
    for vector, weighted, solved in zip(vectors, applied, solution.vectors, strict=True):
        assert list(weighted.manifest.coefficients) == list(vector.layers.blocks)
        assert list(weighted.manifest.coefficients.values()) == list(solved.coefficients.values())
