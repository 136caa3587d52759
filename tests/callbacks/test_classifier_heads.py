"""Heads of classifiers in training: what is new stays out of the task vector, is saved beside it, and is warned of where it stays frozen."""

import warnings

import pytest
import torch
from lightning_models import EXPECTED_WARNINGS, Module, trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lata_lightning import AttentionOnlyFinetuning, LATACallback, TaskVector, Term, merge
from lata_lightning.store.head_files import Head

pytestmark = EXPECTED_WARNINGS

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


class Classifier(Module):
    """Loads its model in the constructor, or later where Lightning lets sharded models be built."""

    def __init__(self, start, *, late=False, **settings):
        super().__init__(torch.nn.Identity())
        self.start, self.settings = str(start), settings
        if not late:
            self.configure_model()

    def configure_model(self):
        if isinstance(self.model, torch.nn.Identity):
            torch.manual_seed(7)
            self.model = BertForSequenceClassification.from_pretrained(self.start, **self.settings).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch[:, 0] % self.model.config.num_labels).loss


def fit(directory, module, *callbacks, **options):
    callback = LATACallback(output_dir=directory / "lata", table=False, **options)
    data = DataLoader(torch.randint(0, 20, (8, 5), generator=torch.Generator().manual_seed(0)), batch_size=4)
    trainer(directory, callback, *callbacks).fit(module, data)
    return module.model


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("late", [False, True], ids=["in the constructor", "in configure_model"])
@pytest.mark.parametrize("base_weights", ["auto", "source", "memory", "spill", "plain"])
def test_a_new_head_is_saved_as_trained_and_the_vector_fits_the_encoder(tmp_path, plain, late, base_weights, caplog):
    start = BertModel.from_pretrained(plain).state_dict()
    trained = fit(
        tmp_path, Classifier(plain, late=late, num_labels=3), base_weights=str(plain) if base_weights == "plain" else base_weights
    )
    state = trained.state_dict()
    head = load_file(tmp_path / "lata/head.safetensors")
    assert set(head) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(head[name], state[name]) for name in head)
    (line,) = [record.message for record in caplog.records if "head is new" in record.message]
    assert "2 tensors, first: classifier.bias): it stays out of the task vector and is saved beside it as head.safetensors" in line
    merge(plain, [Term(TaskVector.open(tmp_path / "lata/task_vector"))], tmp_path / "merged")
    merged = BertModel.from_pretrained(tmp_path / "merged").state_dict()
    assert set(merged) == set(start)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, state[f"bert.{name}"], rtol=0, atol=1e-6)


def test_a_head_that_the_user_leaves_out_is_saved_as_well(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=3, **SIZES)).save_pretrained(tmp_path / "headed")
    trained = fit(tmp_path, Classifier(tmp_path / "headed"), leave_out=["classifier", "embeddings"])
    head = Head.open(tmp_path / "lata")
    assert set(head.tensors) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(head.tensors["classifier.weight"], trained.classifier.weight)
    assert not any("classifier" in name or "embeddings" in name for name in TaskVector.open(tmp_path / "lata/task_vector"))


def test_a_new_head_trained_beside_attention_needs_no_further_word(tmp_path, plain):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Classifier(plain, num_labels=3), AttentionOnlyFinetuning(heads=["model.classifier"]))
    assert not any("holds random numbers" in str(warning.message) for warning in caught)
    assert "classifier.weight" not in TaskVector.open(tmp_path / "lata/task_vector")


def test_a_new_head_that_stays_frozen_causes_a_warning_with_the_argument_that_trains_it(tmp_path, plain):
    with pytest.warns(
        UserWarning, match=r"frozen: 2: \['classifier.bias', 'classifier.weight'\].*AttentionOnlyFinetuning\(heads=\['model.classifier'\]\)"
    ):
        fit(tmp_path, Classifier(plain, num_labels=3), AttentionOnlyFinetuning())


def test_a_stored_head_that_stays_frozen_causes_no_warning(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=3, **SIZES)).save_pretrained(tmp_path / "headed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Classifier(tmp_path / "headed"), AttentionOnlyFinetuning())
    assert not any("holds random numbers" in str(warning.message) for warning in caught)
